"""Which downloaded files become which files of a benchmark: recognises layouts by folder names, writes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.benchmarks.prepare.convert import COPY, Drawing
from ovbench.benchmarks.prepare.sources import SourceFile, text_of
from ovbench.errors import DataError, UsageError

_PACKED = (".zip", ".tar", ".tar.gz", ".tgz")
_STEM = re.compile(r"\w[\w-]*")


class Job(NamedTuple):
    """One file to write.

    Attributes:
        output: '/'-separated path below the data root.
        rule: A key of ``convert.RULES``.
        source: The file that it is made from.
        content: What the rule is given where that is not the file's content.
    """

    output: str
    rule: str
    source: SourceFile
    content: Any = None


@dataclass(frozen=True)
class SplitPlan:
    """What will be there of one split.

    Attributes:
        images: Images in the sources.
        labels: Those of them that have a label there.
        without_label: Some of the others.
        unused: Labels without an image, which are not converted.
    """

    split: str
    expected: int
    images: int
    labels: int
    without_label: tuple[str, ...] = ()
    unused: int = 0


@dataclass
class Plan:
    """All files of a preparation. ``missing`` are splits of which the sources have no image."""

    root: Path
    splits: list[SplitPlan] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)


@dataclass(frozen=True)
class Raw:
    """Where one split lies in what people download.

    Attributes:
        images: Folders of images; the path below the folder without the suffix is the stem.
        labels: Folders of label files.
        label_suffixes: How label files end; "" as the only one: there are none, see ``annotations``.
        rule: How a label is converted.
        split_list: File of stems; "" where every image counts.
        image_rule: How an image is converted.
        stems: "flat": files straight in the folder; "nested": folders in between are part of the stem; "last": they are
            not.
        annotations: One file with the regions of all images.
        beside: One more file that the benchmark reads as it is, by the end of its path; it keeps its place in the layout.
        fetch: What to download.
    """

    images: tuple[str, ...]
    labels: tuple[str, ...]
    label_suffixes: tuple[str, ...]
    rule: str
    fetch: str
    split_list: str = ""
    image_rule: str = COPY
    stems: str = "flat"
    annotations: str = ""
    beside: str = ""


_COCO = "val2017.zip (train2017.zip for training) and stuffthingmaps_trainval2017.zip of COCO and COCO-Stuff"
_CONTEXT = "VOCtrainval_03-May-2010.tar and trainval_merged.json"


def _raw(benchmark: Benchmark) -> Raw | None:
    """The recipe of a benchmark in one of its splits; None where there is none."""
    name, layout, split = benchmark.name, benchmark.layout, benchmark.split
    last = layout.image_dir.rpartition("/")[2]
    if name == "cityscapes":
        fetch = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (registration)"
        return Raw((layout.image_dir,), (layout.label_dir,), ("_gtFine_labelIds.png",), name, fetch, stems="nested")
    if name in ("coco_stuff", "coco_object"):
        return Raw((last,), (last,), (".png",), name, _COCO)
    if name == "coco_stuff10k":
        names = "test" if split == "val" else "train"
        lists = f"imageLists/{names}.txt"
        return Raw(
            ("images", last), ("annotations", last), (".mat", ".png"), name, "cocostuff-10k-v1.1.zip", split_list=lists
        )
    if name == "context459":
        fetch = "VOCtrainval_03-May-2010.tar, PASCAL Context's trainval.tar.gz and pascalcontext_val.txt"
        return Raw((layout.image_dir,), ("trainval",), (".mat",), name, fetch, split_list=layout.split_file)
    if name in ("context59", "context60"):
        return Raw((layout.image_dir,), (), (), "context60", _CONTEXT, annotations="trainval_merged.json")
    if name == "ade847":
        fetch = "the full release ADE20K_2021_17_01 (on request)"
        folder = ("ADE/validation",)
        return Raw(folder, folder, ("_seg.png",), name, fetch, image_rule="ade847_image", stems="last")
    if name in ("voc21", "voc20", "voc20b", "ade20k"):
        fetch = "ADEChallengeData2016.zip" if name == "ade20k" else "VOCtrainval_11-May-2012.tar"
        suffixes = (layout.label_suffix,)
        return Raw((layout.image_dir,), (layout.label_dir,), suffixes, COPY, fetch, split_list=layout.split_file)
    if benchmark.panoptic is not None:
        fetch = {
            "coco_panoptic": "val2017.zip, panoptic_annotations_trainval2017.zip and panoptic_val2017.zip, which lies in it",
            "ade20k_panoptic": "ADEChallengeData2016 after Mask2Former's datasets/prepare_ade20k_pan_seg.py",
            "mapillary": "the archive of Mapillary Vistas v1.2 (registration)",
        }[name]
        # Mask2Former keeps COCO's folder of PNGs beside annotations/, and so does the archive.
        labels = (layout.label_dir.rpartition("/")[2],) if name == "coco_panoptic" else (layout.label_dir,)
        return Raw((layout.image_dir,), labels, (".png",), COPY, fetch, beside=layout.panoptic_file)
    return None


def is_known(benchmark: Benchmark) -> bool:
    """Whether there is a recipe."""
    return _raw(benchmark) is not None


def plan(benchmark: Benchmark, files: Sequence[SourceFile], out: Path, *, in_place: bool, split: str) -> Plan:
    """Everything that has to be written.

    Args:
        benchmark: Any of its splits.
        files: What the sources hold.
        out: The data root; in place, the folder that is or holds it.
        in_place: ``out`` is one of the sources.
        split: "val", "train", or "all" for those that the sources have images of.

    Raises:
        UsageError: No recipe for this benchmark, or no such split.
        DataError: The sources lack something, or hold it twice.
    """
    chosen = [benchmark.for_split(one) for one in (benchmark.splits if split == "all" else (split,))]
    raws = [(one, raw) for one in chosen if (raw := _raw(one)) is not None]
    if not raws:
        raise UsageError(
            f"'{benchmark.name}' is a dataset of your own: nothing is prepared. 'ovbench data check' checks."
        )
    images = {
        one.split: _found(files, raw.images, (one.layout.image_suffix,), raw.stems, one, out) for one, raw in raws
    }
    made = Plan(_root(out, [(one, images[one.split]) for one, _ in raws]) if in_place else out)
    for one, raw in raws:
        if images[one.split]:
            _plan_split(made, one, raw, files, images[one.split])
        else:
            made.missing.append(one.split)
    if not made.splits or (split != "all" and made.missing):
        one, raw = raws[0]
        places = " or ".join(f"{folder}/*{one.layout.image_suffix}" for folder in raw.images)
        packed = [file.path for file in files if not file.member and file.path.endswith(_PACKED)]
        hint = f" The folder has archives ({', '.join(packed[:3])}): give these as --source." if packed else ""
        raise DataError(
            f"The sources have no {one.name} images ({places}). Needed: {raw.fetch}. --source may be given several "
            f"times.{hint}"
        )
    return made


def _root(out: Path, images: Iterable[tuple[Benchmark, dict[str, SourceFile]]]) -> Path:
    """The data root in a source folder: where the images already are as the benchmark wants them, else the folder."""
    prefixes = set()
    for benchmark, found in images:
        for stem, file in found.items():
            wanted = benchmark.layout.image(stem)
            ends = file.home == out and f"/{file.path}".endswith(f"/{wanted}")
            prefixes.add(file.path[: -len(wanted)] if ends else "")
    return out / prefixes.pop() if len(prefixes) == 1 else out


def _split_path(path: str, folders: Sequence[str], suffixes: Sequence[str], stems: str) -> tuple[str, str] | None:
    """What is before the folder, and the stem of a file below one of the folders; None for any other file."""
    suffix = next((one for one in suffixes if path.endswith(one)), None)
    if suffix is None:
        return None
    for folder in folders:
        before, below, rest = f"/{path}".rpartition(f"/{folder}/")
        if below:
            stem = rest[: -len(suffix)]
            stem = stem.rpartition("/")[2] if stems == "last" else stem
            return (before, stem) if stems == "nested" or "/" not in stem else None
    return None


def _preferred(before: Iterable[str], benchmark: Benchmark) -> set[str]:
    """Of several folders that hold the same layout (VOC2010, VOC2012) those that the benchmark customarily has."""
    given = set(before)
    homes = [f"/{home}" for home in benchmark.layout.homes if home]
    usual = {one for one in given if any(one.endswith(home) for home in homes)}
    return usual or given


def _found(
    files: Iterable[SourceFile],
    folders: Sequence[str],
    suffixes: Sequence[str],
    stems: str,
    benchmark: Benchmark,
    out: Path,
) -> dict[str, SourceFile]:
    """The files below one of the folders by stem, sorted.

    Raises:
        DataError: Two different files for one stem.
    """
    places = [
        (file, place) for file in files if (place := _split_path(file.path, folders, suffixes, stems)) is not None
    ]
    usual = _preferred((before for _, (before, _) in places), benchmark)
    found: dict[str, SourceFile] = {}
    for file, (before, stem) in places:
        if before not in usual or stem.endswith("TrainIds"):  # converted files, of this or another benchmark
            continue
        other = found.get(stem)
        if other is not None and other.size != file.size:
            raise DataError(
                f"There are two different files for '{stem}': '{other.where}' and '{file.where}'. Remove one of them, or "
                "give a --source that has only one."
            )
        if other is None or (other.home != out and file.home == out):
            found[stem] = file
    return dict(sorted(found.items()))


def _plan_split(
    made: Plan, benchmark: Benchmark, raw: Raw, files: Sequence[SourceFile], images: dict[str, SourceFile]
) -> None:
    """Adds the jobs of one split."""
    layout = benchmark.layout
    there = {file.on_disk for file in files if not file.member}
    listed: list[str] | None = None
    if raw.annotations:
        source = _one(files, raw.annotations, benchmark, raw.fetch)
        listed, label_jobs = _annotated(benchmark, source)
        made.jobs.append(Job(layout.split_file, "text", source, "".join(f"{stem}\n" for stem in listed)))
    else:
        labels = _found(files, raw.labels, raw.label_suffixes, raw.stems, benchmark, made.root)
        label_jobs = {stem: Job(layout.label(stem), raw.rule, file) for stem, file in labels.items()}
        if raw.split_list:
            source = _one(files, raw.split_list, benchmark, raw.fetch)
            listed = _lines(source)
            if layout.split_file:
                made.jobs += _needed([Job(layout.split_file, COPY, source)], made.root)
        if raw.beside:
            made.jobs += _needed(
                [Job(layout.panoptic_file, COPY, _one(files, raw.beside, benchmark, raw.fetch))], made.root
            )
    stems = sorted(images) if listed is None else [stem for stem in listed if stem in images]
    ready = {stem for stem in stems if made.root / layout.label(stem) in there}
    without = [stem for stem in stems if stem not in label_jobs and stem not in ready]
    if stems and len(without) == len(stems):
        places = " or ".join(f"{folder}/*{end}" for folder in raw.labels for end in raw.label_suffixes)
        raise DataError(
            f"The sources have no {benchmark.name} {benchmark.split} labels ({places}). Needed: {raw.fetch}. --source may "
            "be given several times."
        )
    for stem in stems:
        made.jobs += _needed([Job(layout.image(stem), raw.image_rule, images[stem])], made.root)
        if stem in label_jobs:
            made.jobs += _needed([label_jobs[stem]], made.root)
    unused = len(label_jobs.keys() - images.keys()) if listed is None else len(set(listed) - images.keys())
    expected = benchmark.expected_images
    made.splits.append(
        SplitPlan(benchmark.split, expected, len(stems), len(stems) - len(without), tuple(without[:3]), unused)
    )


def _needed(jobs: Iterable[Job], root: Path) -> Iterator[Job]:
    """The jobs but for copies of what already lies in its place."""
    for job in jobs:
        if job.rule != COPY or job.source.member or job.source.on_disk != root / job.output:
            yield job


def _one(files: Iterable[SourceFile], name: str, benchmark: Benchmark, fetch: str) -> SourceFile:
    """The one file whose path ends with ``name``."""
    found = [file for file in files if f"/{file.path}".endswith(f"/{name}")]
    usual = _preferred((f"/{file.path}"[: -len(name) - 1] for file in found), benchmark)
    found = [file for file in found if f"/{file.path}"[: -len(name) - 1] in usual]
    if not found:
        raise DataError(f"The sources have no '{name}'. Needed: {fetch}. --source may be given several times.")
    if len({file.size for file in found}) > 1:
        raise DataError(f"There are two different '{name}': '{found[0].where}' and '{found[1].where}'. Remove one.")
    return found[0]


def _lines(file: SourceFile) -> list[str]:
    """The stems of a split list.

    Raises:
        DataError: A line that is no file stem.
    """
    lines = [line.strip() for line in text_of(file).splitlines()]
    stems = [line for line in lines if line]
    for stem in stems:
        if not _STEM.fullmatch(stem):
            raise DataError(f"'{file.where}' has a line that is no image name: {stem[:80]!r}. Fetch the list again.")
    return stems


def _annotated(benchmark: Benchmark, file: SourceFile) -> tuple[list[str], dict[str, Job]]:
    """Stems and label jobs of a split from the 'detail' annotations.

    ``images`` have ``image_id, file_name, height, width, phase``; ``annos_segmentation`` have ``image_id, category_id`` and
    a ``segmentation`` with run lengths. Where regions overlap, the later entry counts. Source: the detail API's
    ``getMask``, as mmsegmentation's converter calls it.
    """
    try:
        content = json.loads(text_of(file))
        images = {image["image_id"]: image for image in content["images"] if image["phase"] == benchmark.split}
        regions: dict[Any, list[tuple[int, str | tuple[int, ...]]]] = {key: [] for key in images}
        for entry in content["annos_segmentation"]:
            if entry["image_id"] in regions:
                counts = entry["segmentation"]["counts"]
                runs = counts if isinstance(counts, str) else tuple(int(run) for run in counts)
                regions[entry["image_id"]].append((int(entry["category_id"]), runs))
        jobs = {}
        for key, image in images.items():
            stem = PurePosixPath(image["file_name"]).stem
            if not _STEM.fullmatch(stem):
                raise DataError(f"'{file.where}' names an image {image['file_name']!r}. Fetch the file again.")
            drawing = Drawing(int(image["height"]), int(image["width"]), tuple(regions[key]))
            jobs[stem] = Job(benchmark.layout.label(stem), "context60", file, drawing)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"'{file.where}' is not the annotation file of PASCAL in Detail ({type(error).__name__}: {error}). Fetch it again."
        ) from error
    return sorted(jobs), jobs
