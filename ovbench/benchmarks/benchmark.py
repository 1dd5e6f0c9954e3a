"""A benchmark: a dataset split, its classes with their wordings, and its label rule."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ovbench.benchmarks.config import Words
from ovbench.benchmarks.labels import IGNORE_INDEX, UInt8, decode_label, id_ranges, index_label, train_id_table
from ovbench.benchmarks.layout import Layout, Pair, Scan, complete_pairs, resolve_root, scan
from ovbench.errors import DataError, unknown_name
from ovbench.hashing import sha256_of

# What PackSegInputs hands on; the first five are what evaluation needs to name files and undo the resizing.
META_KEYS = ("img_path", "seg_map_path", "ori_shape", "img_shape", "scale_factor", "reduce_zero_label")


@dataclass(frozen=True)
class SynthRules:
    """How a generated copy of the benchmark looks; see ``ovbench.benchmarks.synth``.

    Attributes:
        home: Folder of the data root below the output folder; "" is the output folder itself.
        stems: Patterns of the file stems with ``{i}``, used in turn.
        short: Short side of the generated images in pixels.
        long: Long side in pixels.
        portraits: Every third image is upright.
        label_mode: Pillow mode of the label PNGs, "L" or "P".
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
class Benchmark:
    """One benchmark, read from ``dataset_configs``.

    Attributes:
        name: Id, e.g. ``"voc21"``.
        title: Full name for people.
        version: Raised whenever a score on it can move.
        num_classes: K, the background included where ``has_background``.
        class_names: Display names in label order, K.
        has_background: Class 0 is "everything else".
        reduce_zero_label: The files' 0 is ignored and 1..K become 0..K-1.
        ignore_index: Training id that no metric counts.
        expected_images: Images in the official split.
        palette: RGB colours of the classes, K.
        wordings: Names of the word lists, the first being the customary one.
        labels_from: Where the label files come from and what they hold.
        zero_in_most: The raw value 0 occurs in most official label files.
        has_255: The raw value 255 occurs in the official label files.
        raw_gaps: Values that an unconverted label file never has (COCO-Stuff), else empty.
        layout: Folders and file names.
        synth_rules: Look of the generated copy.
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
    ignore_index: int = IGNORE_INDEX

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

    def dataset_cfg(self, root: Path | str, *, short_side: int, long_side: int) -> dict[str, Any]:
        """The mmengine config of an mmseg dataset over ``root``, to be built under the default scope ``mmseg``.

        The image is resized, the label never is: the annotations are loaded after the resizing.

        Args:
            root: The data root or a folder above it.
            short_side: Short side of the network input in pixels; 0 leaves the image as it is.
            long_side: Upper limit of its long side in pixels.
        """
        home = self.resolve_root(root)
        # Only mmseg's LoadAnnotations knows reduce_zero_label; mmcv has a transform of the same name.
        pipeline: list[dict[str, Any]] = [{"type": "LoadImageFromFile"}]
        if short_side:
            pipeline.append({"type": "Resize", "scale": (long_side, short_side), "keep_ratio": True})
        pipeline.append({"type": "mmseg.LoadAnnotations"})
        pipeline.append({"type": "mmseg.PackSegInputs", "meta_keys": META_KEYS})
        cfg: dict[str, Any] = {
            "type": self.dataset_type,
            "data_root": str(home),
            "data_prefix": {"img_path": self.layout.image_dir, "seg_map_path": self.layout.label_dir},
            "ann_file": self.layout.split_file,
            "img_suffix": self.layout.image_suffix,
            "seg_map_suffix": self.layout.label_suffix,
            "reduce_zero_label": self.reduce_zero_label,
            "ignore_index": self.ignore_index,
            "test_mode": True,
            "pipeline": pipeline,
        }
        if self.dataset_type == "BaseSegDataset":
            # The other types have names of their own; giving them again, even equal ones, makes mmseg compare lists and
            # map labels.
            cfg["metainfo"] = {"classes": self.class_names, "palette": [list(colour) for colour in self.palette]}
        return cfg

    def to_train_ids(self, label: npt.NDArray[np.generic]) -> UInt8:
        """Training ids of a decoded label PNG, uint8 (H, W): what mmseg's ``LoadAnnotations`` makes of it.

        Args:
            label: Stored values (H, W): palette indices or grey values, not colours.

        Raises:
            DataError: A coloured label or values above 255.
        """
        return train_id_table(self.reduce_zero_label)[index_label(label)]

    def load_label(self, path: Path | str) -> UInt8:
        """Training ids of a label file, uint8 (H, W), every one a class or the ignore index.

        Raises:
            DataError: The file is missing, damaged or coloured, or holds ids that the benchmark does not have.
        """
        source = Path(path)
        raw = index_label(decode_label(source), source)
        train_ids = train_id_table(self.reduce_zero_label)[raw]
        self.require_in_range(train_ids, source)
        return train_ids

    def require_in_range(self, train_ids: npt.NDArray[np.integer[Any]], source: Path | str) -> None:
        """Raises ``DataError`` naming file and ids where a training id is neither 0..K-1 nor the ignore index."""
        present = np.unique(train_ids)
        wrong = present[(present >= self.num_classes) & (present != self.ignore_index)]
        if wrong.size:
            raw = wrong + 1 if self.reduce_zero_label else wrong
            first = 1 if self.reduce_zero_label else 0
            raise DataError(
                f"The label '{source}' holds the ids {id_ranges(raw)}, which {self.name} does not have (classes are "
                f"{first}..{self.num_classes - 1 + first}). {self.labels_from}. "
                f"'ovbench data check {self.name} --data-root ...' looks at all files."
            )

    def fingerprint(self, root: Path | str) -> str:
        """sha256 (hex) over the benchmark's name and version and, in order, names and sizes of all files.

        File contents are not read, so a change that keeps every size goes unseen.
        """
        digest = hashlib.sha256(f"{self.name}\n{self.version}\n".encode())
        for pair in self.pairs(root):
            digest.update(f"{pair.stem}\t{os.path.getsize(pair.image)}\t{os.path.getsize(pair.label)}\n".encode())
        return digest.hexdigest()
