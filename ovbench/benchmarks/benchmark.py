"""A benchmark: a dataset, its classes with their wordings, and its label rule, looked at in one of its splits."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.catalog import with_split
from ovbench.benchmarks.config import Words
from ovbench.benchmarks.labels import IGNORE_INDEX, Ids, LabelRule
from ovbench.benchmarks.layout import Layout, Pair, Scan, complete_pairs, resolve_root, scan
from ovbench.benchmarks.panoptic_files import Panoptic, SegmentMap, load_segments, read_panoptic
from ovbench.errors import UsageError, unknown_name
from ovbench.hashing import sha256_of, sha256_of_file

# What PackSegInputs hands on; the first five are what evaluation needs to name files and undo the resizing.
META_KEYS = ("img_path", "seg_map_path", "ori_shape", "img_shape", "scale_factor", "reduce_zero_label")


@dataclass(frozen=True)
class SynthRules:
    """How a generated copy of the benchmark looks; see ``ovbench.benchmarks.synth.copies``.

    Attributes:
        home: Folder of the data root below the output folder; "" is the output folder itself.
        stems: Patterns of the file stems with ``{i}``, used in turn.
        short: Short side of the generated images in pixels.
        long: Long side in pixels.
        portraits: Every third image is upright.
        label_mode: Pillow mode of the label files: "L", "P" or "I;16".
        void: Where unlabelled pixels are: "border" of regions, a "patch", a "strip" at the bottom, or "none".
        things: "foreground": the classes are objects before words of label 0; "any": no distinction.
        always_zero: Every image shows something with the raw label 0.
        zero_words: What the raw label 0 shows where it is no class.
    """

    home: str
    stems: tuple[str, ...]
    short: int
    long: int
    portraits: bool
    label_mode: str
    void: str
    things: str
    always_zero: bool = False
    zero_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Where the images of one split lie.

    Attributes:
        layout: Folders and file names.
        expected_images: Images in the official split.
        stems: Patterns of the file stems of a generated copy with ``{i}``, used in turn.
    """

    layout: Layout
    expected_images: int
    stems: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark in one of its splits, read from ``dataset_configs``.

    Attributes:
        name: Id, e.g. ``"voc21"``.
        title: Full name for people.
        version: Raised whenever a score on it can move.
        num_classes: K, the background included where ``has_background``.
        class_names: Display names in label order, K.
        has_background: Class 0 is "everything else".
        background: The class that is "everything else", to which thresholds leave pixels; None where there is none.
        reduce_zero_label: The files' 0 is ignored and 1..K become 0..K-1.
        ignore_index: Training id that no metric counts: 255, or 65535 where label files have 16 bits.
        raw_ids: The value that label files have for each class, where it is another order of 0..K-1; else empty.
        group: "eight" for the customary eight, "large-vocabulary", "closed-set"; "own" where the config says nothing.
        split: "val" or "train".
        splits: The splits that there are.
        expected_images: Images in the official split.
        palette: RGB colours of the classes, K.
        wordings: Names of the word lists, the first being the customary one.
        labels_from: Where the label files come from and what they hold.
        zero_in_most: The raw value 0 occurs in most official label files.
        has_255: The ignored value (255, in 16-bit files 65535) occurs in the official label files.
        ignored_in_most: The ignored value occurs in most of them.
        raw_gaps: Values that an unconverted label file never has (COCO-Stuff), else empty.
        layout: Folders and file names.
        synth_rules: Look of the generated copy.
        panoptic: Where labels are segments; None where they are classes per pixel.
        downloads: Files that each split is prepared from, see ``facts``; nothing where that is not known.
    """

    name: str
    title: str
    version: int
    num_classes: int
    class_names: tuple[str, ...]
    has_background: bool
    reduce_zero_label: bool
    expected_images: int
    palette: tuple[tuple[int, int, int], ...]
    wordings: tuple[str, ...]
    labels_from: str
    zero_in_most: bool
    has_255: bool
    raw_gaps: tuple[int, ...]
    layout: Layout
    synth_rules: SynthRules
    dataset_type: str
    word_lists: dict[str, Words] = field(repr=False, hash=False)
    splits: dict[str, Split] = field(repr=False, hash=False)
    split: str = "val"
    group: str = "own"
    ignore_index: int = IGNORE_INDEX
    raw_ids: tuple[int, ...] = ()
    panoptic: Panoptic | None = None
    ignored_in_most: bool = False
    background: int | None = None
    downloads: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False, hash=False)

    def for_split(self, split: str) -> Benchmark:
        """The same benchmark looked at in another of its splits: "val" or "train".

        Raises:
            UsageError: There is no such split; the message names the benchmarks that can be trained on.
        """
        if split not in self.splits:
            if split != "train":
                raise unknown_name("split", split, self.splits)
            raise UsageError(f"{self.name} has no training split here. Those that have one: {', '.join(with_split())}.")
        found = self.splits[split]
        return replace(
            self,
            split=split,
            layout=found.layout,
            expected_images=found.expected_images,
            synth_rules=replace(self.synth_rules, stems=found.stems),
        )

    @property
    def command_name(self) -> str:
        """What commands call it."""
        return self.name

    @property
    def label_rule(self) -> LabelRule:
        """How its label files are read; see :mod:`ovbench.benchmarks.labels`."""
        return LabelRule(
            self.command_name,
            self.num_classes,
            self.reduce_zero_label,
            self.ignore_index,
            self.raw_ids,
            self.labels_from,
            self.split,
        )

    @property
    def wide(self) -> bool:
        """Label files have 16 bits."""
        return self.label_rule.wide

    @property
    def id_table(self) -> Ids:
        """The training id of each raw value 0..``ignore_index``."""
        return self.label_rule.table

    @property
    def stored_ids(self) -> tuple[int, ...]:
        """The value that label files have for each class, K."""
        return self.raw_ids or tuple(index + self.reduce_zero_label for index in range(self.num_classes))

    def words(self, wording: str) -> list[list[str]]:
        """The words of each class under a named wording: K lists of at least one word, in label order.

        Raises:
            UsageError: The benchmark has no wording of that name.
        """
        if wording not in self.word_lists:
            raise unknown_name(f"wording of {self.name}", wording, self.wordings)
        return [list(words) for words in self.word_lists[wording]]

    def words_sha256(self, wording: str) -> str:
        """The hash of a word list (hex): equal for equal words in equal order, whatever the list is called."""
        return sha256_of(self.words(wording))

    def resolve_root(self, path: Path | str) -> Path:
        """The data root at ``path``, in a customary folder below it, or just above it.

        Raises:
            DataError: Nothing there or only a part; the message says what was looked for and how to get it.
        """
        return resolve_root(self.layout, self.name, self.labels_from, path)

    def scan(self, root: Path | str) -> Scan:
        """What lies below a data root, incomplete pairs included (for checking)."""
        return scan(self.layout, self.resolve_root(root))

    def pairs(self, root: Path | str) -> list[Pair]:
        """Images and labels in the order in which mmseg reads them, at least one.

        Raises:
            DataError: No data, or an image without label, or a listed image that is missing.
        """
        return complete_pairs(self.layout, self.name, self.labels_from, self.resolve_root(root))

    def dataset_cfg(
        self,
        root: Path | str,
        *,
        short_side: int = 0,
        long_side: int = 2048,
        pipeline: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """The mmengine config of an mmseg dataset over the split, to be built under the default scope ``mmseg``.

        The image is resized, the label never is: the annotations are loaded after the resizing.

        Args:
            root: The data root or a folder above it.
            short_side: Short side of the network input in pixels; 0 leaves the image as it is.
            long_side: Upper limit of its long side in pixels.
            pipeline: Transforms for training, in place of all these.
        """
        home = self.resolve_root(root)
        cfg: dict[str, Any] = {
            "type": self.dataset_type,
            "data_root": str(home),
            "data_prefix": {"img_path": self.layout.image_dir, "seg_map_path": self.layout.label_dir},
            "ann_file": self.layout.split_file,
            "img_suffix": self.layout.image_suffix,
            "seg_map_suffix": self.layout.label_suffix,
            "reduce_zero_label": self.reduce_zero_label,
            "ignore_index": self.ignore_index,
            "test_mode": pipeline is None,
            "pipeline": self._transforms(short_side, long_side) if pipeline is None else pipeline,
        }
        if self.panoptic is not None:
            cfg["panoptic_file"] = str(home / self.layout.panoptic_file)
            cfg["category_ids"] = list(self.panoptic.category_ids)
        if self.dataset_type == "BaseSegDataset" or self.raw_ids or self.panoptic is not None:
            # The other types have names of their own; giving them again makes mmseg compare lists and map labels, which
            # is wanted only where the classes have another order than theirs.
            cfg["metainfo"] = {"classes": self.class_names, "palette": [list(colour) for colour in self.palette]}
        return cfg

    def _transforms(self, short_side: int, long_side: int) -> list[dict[str, Any]]:
        """The evaluation's transforms: image, resizing, label."""
        steps: list[dict[str, Any]] = [{"type": "LoadImageFromFile"}]
        if short_side:
            steps.append({"type": "Resize", "scale": (long_side, short_side), "keep_ratio": True})
        if self.panoptic is not None:
            steps.append({"type": "mmseg.LoadPanopticAnnotations"})
            stored = not self.panoptic.exact_areas
            return [*steps, {"type": "mmseg.PackPanopticInputs", "meta_keys": META_KEYS, "stored_areas": stored}]
        return [*steps, self.label_step, {"type": "mmseg.PackSegInputs", "meta_keys": META_KEYS}]

    @property
    def label_step(self) -> dict[str, Any]:
        """The transform that loads a label; ``ovbench.mm.label_loading`` registers it."""
        return {"type": "mmseg.LoadLabel", **asdict(self.label_rule)}

    def to_train_ids(self, label: npt.NDArray[np.generic]) -> Ids:
        """Training ids of a decoded label file (H, W), uint8 or uint16: what mmseg's ``LoadAnnotations`` makes of it.

        Args:
            label: Stored values (H, W): palette indices or grey values, not colours.

        Raises:
            DataError: A coloured label or values above the ignore index.
        """
        return self.label_rule.train_ids(label)

    def load_label(self, path: Path | str) -> Ids:
        """Training ids of a label file (H, W), uint8 or uint16, every one a class or the ignore index.

        Raises:
            DataError: The file is missing, damaged or coloured, or holds ids that the benchmark does not have.
        """
        source = Path(path)
        if self.panoptic is not None:
            return self.load_segments(source).labels()
        return self.label_rule.load(source)

    def load_segments(self, path: Path | str) -> SegmentMap:
        """The segments of a label file of a panoptic benchmark.

        Raises:
            DataError: File or json are missing or damaged, or contradict each other.
        """
        assert self.panoptic is not None  # those who call know
        source = Path(path)
        root = source.parents[len(PurePosixPath(self.layout.label_dir).parts)]
        return load_segments(
            source, read_panoptic(root / self.layout.panoptic_file).images.get(source.stem), self.panoptic
        )

    def require_in_range(self, train_ids: npt.NDArray[np.integer[Any]], source: Path | str) -> None:
        """Raises ``DataError`` naming file and ids where a training id is neither 0..K-1 nor the ignore index."""
        self.label_rule.require_classes(train_ids, source)

    @property
    def split_option(self) -> str:
        """What messages add to commands that look at this split."""
        return "" if self.split == "val" else f" --split {self.split}"

    def fingerprint(self, root: Path | str, *, incomplete: bool = False) -> str:
        """sha256 (hex) over the benchmark's name, version and split and, in order, names and sizes of all files.

        Of a panoptic benchmark also over the content of the json file. Other files are not read, so a change that keeps
        every size goes unseen.

        Args:
            root: The data root or a folder above it.
            incomplete: Files may be missing, which then count by name.

        Raises:
            DataError: No data, or files are missing where they may not.
        """
        found = self.scan(root) if incomplete else None
        absent = [] if found is None else [*found.missing_images, *found.missing_labels]
        split = "" if self.split == "val" else f"{self.split}\n"  # fingerprints of val are older than splits
        digest = hashlib.sha256(f"{self.name}\n{self.version}\n{split}".encode())
        if self.panoptic is not None:
            digest.update(f"{sha256_of_file(self.resolve_root(root) / self.layout.panoptic_file)}\n".encode())
        for pair in found.pairs if found is not None and absent and found.pairs else self.pairs(root):
            digest.update(f"{pair.stem}\t{os.path.getsize(pair.image)}\t{os.path.getsize(pair.label)}\n".encode())
        for name in absent:
            digest.update(f"{name}\tmissing\n".encode())
        return digest.hexdigest()
