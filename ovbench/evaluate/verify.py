"""A recorded run repeated: whether its areas come out again, and what differs around them.

The areas per image are compared, which no rounding hides. What a record does not hold (where the data lies, a weights
file, a method or class list of the user's own) is asked for; nothing is stored among the results.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovbench.errors import DataError, Interrupted, OvbenchError, UsageError, WeightsError
from ovbench.evaluate.run import run
from ovbench.hashing import sha256_of_file
from ovbench.results import image_areas, store
from ovbench.results.image_areas import ImageAreas
from ovbench.results.measured import flat
from ovbench.results.record import Metrics, RunRecord, metrics_from_areas
from ovbench.spec import RunSpec, validated

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pairs = dict[str, tuple[Any, Any]]

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_OPENAI_FORMAT = "openai-format-"  # begins the architecture of a file that was read without one
_BASE = "base."  # begins the options of a wrapped method


@dataclass(frozen=True)
class Given:
    """What a record does not hold.

    Attributes:
        data_root: Folder of the dataset.
        weights: File whose hash must be the recorded one.
        method: ``PATH.py:Class`` of a method of the user's own.
        dataset: Path of a benchmark of the user's own.
        wording: Class list file.
        templates: Template file.
        options: Options of the method in place of recorded ones, e.g. the file of a second backbone.
        device: Another device than the recorded one.
        images: Only the first so many of the recorded images.
        workers: Processes that read images.
    """

    data_root: Path | None = None
    weights: Path | None = None
    method: str | None = None
    dataset: str | None = None
    wording: str | None = None
    templates: str | None = None
    options: Mapping[str, Any] | None = None
    device: str | None = None
    images: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class ImageDifference:
    """An image whose areas differ.

    Attributes:
        name: File name.
        pixels: Fewest pixels whose prediction must have changed for the areas to differ so.
        labelled: Pixels with a label.
    """

    name: str
    pixels: int
    labelled: int


@dataclass(frozen=True)
class Verification:
    """A record against a repetition of its run; pairs are (recorded, now).

    Attributes:
        run_id: The recorded run.
        images: Images compared.
        of: Images that the record holds.
        per_image: Whether areas per image were compared; False where only their sums are recorded.
        pixels: Fewest pixels whose prediction must have changed, over all images.
        labelled: Pixels with a label.
        differing: Images whose areas differ, most pixels first; empty where ``per_image`` is False.
        label_differs: Images whose label files differ.
        miou: Percent over the compared images, unrounded.
        classes: IoU in percent of each class that differs.
        spec: Fields of the spec that differ, except the number of images.
        data: Fingerprints, where they differ.
        environment: Fields of machine and numerics that differ.
        packages: Versions that differ.
        code: Commit of ovbench and whether it had changes, where they differ.
        pq: Panoptic quality in percent; None on a side that has none, or where not all recorded images were repeated.
        panoptic_equal: Whether counts and sums of IoU of every class are the recorded ones, where ``pq`` has both.
    """

    run_id: str
    images: int
    of: int
    per_image: bool
    pixels: int
    labelled: int
    differing: tuple[ImageDifference, ...]
    label_differs: tuple[str, ...]
    miou: tuple[float | None, float | None]
    classes: Pairs
    spec: Pairs
    data: Pairs
    environment: Pairs
    packages: Pairs
    code: Pairs
    pq: tuple[float | None, float | None] = (None, None)
    panoptic_equal: bool = True

    @property
    def equal(self) -> bool:
        """Whether all areas are the recorded ones, to the pixel, and with them the panoptic quality."""
        return self.pixels == 0 and not self.differing and not self.label_differs and self.panoptic_equal

    @property
    def difference(self) -> float | None:
        """mIoU now minus recorded, percentage points."""  # noqa: D403 (the metric's name)
        recorded, now = self.miou
        return None if recorded is None or now is None else now - recorded

    def to_data(self) -> dict[str, Any]:
        """Plain dicts and lists for JSON, unrounded."""
        return {"equal": self.equal, **asdict(self), "difference": self.difference}


def verify(
    record: RunRecord,
    path: Path,
    given: Given | None = None,
    *,
    on_images: Callable[[int, int], None] = lambda done, total: None,
    on_message: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Runs a record's spec again in a temporary folder and compares.

    Args:
        record: The record.
        path: Its file; the areas per image lie beside it.
        given: What the record does not hold.
        on_images: Progress callback (finished, total).
        on_message: Receives notices for the user.

    Raises:
        UsageError: Something must be given, or there is nothing to verify.
        WeightsError: The weights file is not the recorded one.
        DataError: The images are not the recorded ones.
    """
    given = given or Given()
    if record.metrics is None:
        raise UsageError(f"The run {record.run_id} has no finished image ({record.reason}): nothing to verify.")
    recorded = _recorded_areas(record, path, given.images, on_message)
    spec = spec_again(record, given)
    with tempfile.TemporaryDirectory(prefix="ovbench-verify-") as folder:
        try:
            now = run(
                spec,
                data_root=given.data_root,
                results=Path(folder),
                batch=None if record.efficiency is None else record.efficiency.batch,
                workers=given.workers,
                on_error="skip" if record.failures else "stop",
                gallery=0,
                command=shlex.join(["ovbench", *sys.argv[1:]]),
                on_images=on_images,
                on_message=on_message,
            )
        except Interrupted:
            raise Interrupted("Interrupted: nothing is verified.") from None
        except OvbenchError as error:
            # the record of that failed run goes with the folder
            raise type(error)(f"Cannot repeat the run: {str(error).split(' Record of the failed run: ')[0]}") from error
        again = image_areas.read(image_areas.path_beside(store.record_path(now, folder)), now)
    return _compared(record, now, recorded, again, given)


def spec_again(record: RunRecord, given: Given) -> RunSpec:
    """The spec that repeats a recorded run.

    Raises:
        UsageError: A part of it is a file that must be given.
        WeightsError: The weights file is not the recorded one.
    """
    from ovbench import benchmarks
    from ovbench.registry import class_of, is_path

    old = record.spec
    method = given.method or old.method
    base = str({**old.method_options, **(given.options or {})}.get("base", ""))
    if is_path(base) and "base" not in (given.options or {}):
        raise UsageError(
            f"The record names the file '{base}' as base method, whose code would be run: add --option base=."
        )
    if given.method is None and ("source_sha256" in old.method_options or is_path(old.method)):
        raise UsageError(
            f"'{old.method}' is a method from a file, which the record does not hold: add --method FILE.py:CLASS."
        )
    dataset = given.dataset or old.dataset
    if given.dataset is None and dataset not in benchmarks.names():
        raise UsageError(f"'{dataset}' is a benchmark of your own: add --dataset with its folder or config.")
    protocol = old.protocol.model_dump()
    protocol |= {name: getattr(given, name) for name in ("wording", "templates") if getattr(given, name) is not None}
    limit = old.limit
    assert record.metrics is not None  # held by verify
    if given.images is not None or record.status != "ok":
        limit = min(given.images or record.metrics.images, record.metrics.images)
    fields_again = {
        **old.model_dump(),
        "method": method,
        "method_options": options_again(old.method_options, class_of(method), given.options or {}),
        "dataset": dataset,
        "protocol": protocol,
        "weights": _weights(old, given.weights),
        "arch": None if _finds_its_architecture(old) else old.arch,
        "device": given.device or old.device,
        "limit": limit,
    }
    spec: RunSpec = validated(RunSpec, fields_again)
    return spec


def _finds_its_architecture(old: RunSpec) -> bool:
    """Whether the weights say what they are made for, so that the recorded architecture was found, not given."""
    found = old.weights == "builtin" or old.weights.startswith("hf-hub:")
    return found or (old.arch or "").startswith(_OPENAI_FORMAT)


def _weights(old: RunSpec, file: Path | None) -> str:
    if file is None:
        if Path(old.weights).suffix in WEIGHT_SUFFIXES:
            raise UsageError(
                f"The run used the weights file '{old.weights}', of which the record holds only name and hash: add "
                f"--weights FILE (sha256 {str(old.weights_sha256)[:16]}...)."
            )
        return old.weights
    if not file.is_file():
        raise WeightsError(f"No weights file '{file}'.")
    digest = sha256_of_file(file)
    if digest != old.weights_sha256:
        raise WeightsError(
            f"'{file}' is not what the run used: its sha256 is {digest[:16]}..., recorded is "
            f"{str(old.weights_sha256)[:16]}... ({old.weights})."
        )
    return str(file)


def options_again(recorded: Mapping[str, Any], cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a method as it was recorded: its config's fields, without what it found out by itself.

    Args:
        recorded: ``method_options`` of a record.
        cls: The method.
        given: Options in place of recorded ones.

    Raises:
        UsageError: The weights of a second backbone were a file, which must be given.
    """
    from ovbench.registry import method_class

    known = {field.name: field for field in fields(cls.Config)}
    if "base" in recorded and "base" in known:
        base = method_class(str(recorded["base"]))
        known |= {_BASE + field.name: field for field in fields(base.Config)}
    chosen: dict[str, Any] = {}
    for name, value in {**cls.BEFORE, **recorded}.items():  # what came later stands at what was done before it
        if name not in known or name in given or value is None:
            continue
        if name.endswith("_weights") and value != "random":
            # Of published weights the record holds the repository. None fetches it again, and the hash is compared.
            if recorded.get(name.removesuffix("_weights")) == "clip" or "/" in str(value):
                continue
            raise UsageError(
                f"The run used '{value}' for {name}, of which the record holds only the name: add --option {name}=FILE."
            )
        # JSON has no tuples
        chosen[name] = tuple(value) if isinstance(known[name].default, tuple) and isinstance(value, list) else value
    return {**chosen, **given}


def _recorded_areas(
    record: RunRecord, path: Path, images: int | None, on_message: Callable[[str], None]
) -> ImageAreas | None:
    """The areas per image; None where only their sums are there to be compared."""
    beside = image_areas.path_beside(path)
    if beside.is_file():
        return image_areas.read(beside, record)
    if images is not None:
        raise DataError(
            f"There is no '{beside.name}' beside the record, which holds the areas per image: without it only the whole "
            "run can be verified. Copy it along, or leave --limit away."
        )
    on_message(f"No '{beside.name}' beside the record: only the sums over all images are compared.")
    return None


def _compared(
    record: RunRecord, now: RunRecord, recorded: ImageAreas | None, again: ImageAreas, given: Given
) -> Verification:
    assert record.metrics is not None and now.metrics is not None  # both have finished images
    differing: list[ImageDifference] = []
    labels: list[str] = []
    if recorded is None:
        before = record.metrics
        pixels = _changed(_sums(before), _sums(now.metrics))
    else:
        recorded = recorded.first(len(again.names))
        _require_same_images(recorded.names, again.names)
        before = _metrics(record, recorded)
        for index, name in enumerate(again.names):
            changed = _changed(_of_image(recorded, index), _of_image(again, index))
            if (recorded.label[index] != again.label[index]).any():
                labels.append(name)
            if changed:
                differing.append(ImageDifference(name, changed, int(again.label[index].sum())))
        pixels = sum(entry.pixels for entry in differing)
    scores = zip(before.classes, now.metrics.classes, strict=True)
    whole = now.metrics.images == record.metrics.images
    quality = (record.metrics.panoptic, now.metrics.panoptic) if whole else (None, None)
    ignored = {"limit"} | {name for name in ("weights", "arch") if given.weights is not None}
    ignored |= {f"protocol.{name}" for name in ("wording", "templates") if getattr(given, name) is not None}
    spec = _pairs(flat(record.spec.model_dump(mode="json")), flat(now.spec.model_dump(mode="json")))
    return Verification(
        run_id=record.run_id,
        images=now.metrics.images,
        of=record.metrics.images,
        per_image=recorded is not None,
        pixels=pixels,
        labelled=int(again.label.sum()),
        differing=tuple(sorted(differing, key=lambda entry: (-entry.pixels, entry.name))),
        label_differs=tuple(labels),
        miou=(before.miou, now.metrics.miou),
        pq=(None if quality[0] is None else quality[0].pq, None if quality[1] is None else quality[1].pq),
        panoptic_equal=quality[0] == quality[1],
        classes={old.name: (old.iou, new.iou) for old, new in scores if old.iou != new.iou},
        spec={name: pair for name, pair in spec.items() if name not in ignored},
        data=_pairs(*({"dataset fingerprint": one.provenance.dataset_fingerprint} for one in (record, now))),
        environment=_pairs(*(flat(one.environment.model_dump(mode="json")) for one in (record, now))),
        packages=_pairs(record.provenance.package_versions, now.provenance.package_versions),
        code=_pairs(*(_code(one) for one in (record, now))),
    )


def _code(record: RunRecord) -> dict[str, Any]:
    source = record.provenance
    return {"git commit": source.git_commit, "uncommitted changes": source.git_dirty}


def _require_same_images(recorded: Sequence[str], now: Sequence[str]) -> None:
    if tuple(recorded) == tuple(now):
        return
    first = next((pair for pair in zip(recorded, now, strict=False) if pair[0] != pair[1]), None)
    what = (
        f"the first that differs is '{first[0]}', here '{first[1]}'" if first else f"{len(recorded)}, here {len(now)}"
    )
    raise DataError(f"The images are not those of the record: {what}. Give the same data with --data-root.")


def _of_image(areas: ImageAreas, index: int) -> NDArray[np.int64]:
    """(2, K) pixels predicted rightly and wrongly as each class."""
    import numpy as np

    return np.stack([areas.intersect[index], areas.pred[index] - areas.intersect[index]])


def _sums(metrics: Metrics) -> NDArray[np.int64]:
    import numpy as np

    return np.array([[score.intersect, score.pred - score.intersect] for score in metrics.classes], dtype=np.int64).T


def _changed(one: NDArray[np.int64], two: NDArray[np.int64]) -> int:
    """Fewest pixels that must move between cells to turn one table of counts into another."""
    import numpy as np

    moved = two - one
    return int(max(np.maximum(moved, 0).sum(), np.maximum(-moved, 0).sum()))


def _metrics(record: RunRecord, areas: ImageAreas) -> Metrics:
    assert record.metrics is not None
    sums = (part.sum(axis=0).tolist() for part in (areas.intersect, areas.union, areas.pred, areas.label))
    return metrics_from_areas([score.name for score in record.metrics.classes], *sums, images=len(areas.names))


def _pairs(one: Mapping[str, Any], two: Mapping[str, Any]) -> Pairs:
    names = dict.fromkeys([*one, *two])
    return {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}
