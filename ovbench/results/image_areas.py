"""Areas per image, read from the file beside a record, as integer arrays; needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovbench.errors import DataError
from ovbench.results.record import RunRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUFFIX = ".areas.jsonl"
VERSION = 1


@dataclass(frozen=True)
class ImageAreas:
    """Pixel counts of every image of a run, sorted by place in the dataset.

    Attributes:
        names: N file names.
        intersect: (N, K) int64, pixels predicted and labelled as a class.
        pred: (N, K) int64, pixels predicted as a class.
        label: (N, K) int64, pixels labelled as a class.
    """

    names: tuple[str, ...]
    intersect: NDArray[np.int64]
    pred: NDArray[np.int64]
    label: NDArray[np.int64]

    @property
    def union(self) -> NDArray[np.int64]:
        """(N, K) int64, pixels predicted or labelled as a class."""
        return self.pred + self.label - self.intersect

    def first(self, count: int) -> ImageAreas:
        """Those of the first images."""
        return ImageAreas(self.names[:count], self.intersect[:count], self.pred[:count], self.label[:count])


def path_beside(record_path: Path) -> Path:
    """Where the areas of a record lie."""
    return record_path.with_name(record_path.name.removesuffix(".json") + SUFFIX)


def read(path: Path, record: RunRecord) -> ImageAreas:
    """The areas of a record's images.

    Raises:
        DataError: The file is missing, broken, of another run, or its sums are not the record's.
    """
    import numpy as np

    if record.metrics is None:
        raise DataError(f"The run {record.run_id} has no finished image.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header: dict[str, Any] = json.loads(lines[0]) if lines else {}
        entries = {int(entry["index"]): entry for entry in map(json.loads, lines[1:]) if "error" not in entry}
    except OSError as error:
        raise DataError(
            f"Cannot read the areas per image of {record.run_id} at '{path}': {error.strerror or error}. They lie beside "
            "the record and must be copied along with it."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"'{path}' is broken: {error}.") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != VERSION:
        raise DataError(f"'{path}' has version {version!r}; this ovbench reads {VERSION}.")
    if header.get("dataset_fingerprint") != record.provenance.dataset_fingerprint:
        raise DataError(f"'{path}' belongs to another run than {record.run_id}: its dataset fingerprint differs.")
    ordered = [entries[index] for index in sorted(entries)]
    shape = (len(ordered), len(record.metrics.classes))
    arrays = {name: np.zeros(shape, dtype=np.int64) for name in ("intersect", "pred", "label")}
    try:
        for row, entry in enumerate(ordered):
            for name, array in arrays.items():
                array[row, entry["classes"]] = entry[name]
    except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"'{path}' does not fit the record {record.run_id}: {error}.") from error
    for name, array in arrays.items():
        if array.sum(axis=0).tolist() != [getattr(score, name) for score in record.metrics.classes]:
            raise DataError(f"'{path}' does not fit the record {record.run_id}: the sums of '{name}' differ.")
    return ImageAreas(tuple(str(entry["name"]) for entry in ordered), **arrays)
