"""One line of a shard file: a finished image, or one that was skipped, as JSON with a checksum of itself."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovbench.ops.areas import Areas
from ovbench.ops.panoptic import Quality


@dataclass(frozen=True)
class ImageResult:
    """One finished image.

    Attributes:
        index: Place in the dataset.
        name: File name for people.
        areas: Pixel counts per class (K,), int64.
        times_ms: Milliseconds per stage and in ``total``.
        quality: Parts of panoptic quality per class (K,); None where truth or prediction has no segments.
    """

    index: int
    name: str
    areas: Areas
    times_ms: dict[str, float]
    quality: Quality | None = None


def sealed(content: dict[str, Any]) -> bytes:
    """A line with its checksum."""
    return _text({**content, "crc": zlib.crc32(_text(content))}) + b"\n"


def opened(line: bytes) -> dict[str, Any] | None:
    """The content of a line; None where it is damaged. Lines of older files have no checksum."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    known = content.pop("crc", None)
    return content if known is None or known == zlib.crc32(_text(content)) else None


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def failure_entry(item: tuple[int, tuple[str, str]]) -> dict[str, Any]:
    """An image that was skipped, (index, (name, reason)), as the content of a line."""
    index, (name, reason) = item
    return {"index": index, "name": name, "error": reason}


def result_entry(result: ImageResult) -> dict[str, Any]:
    """A finished image as the content of a line; only the classes that occur are listed."""
    used = ((result.areas.pred > 0) | (result.areas.label > 0)).nonzero()[:, 0]
    panoptic = {} if result.quality is None else {"panoptic": _quality_entry(result.quality)}
    return {
        "index": result.index,
        "name": result.name,
        "classes": used.tolist(),
        "intersect": result.areas.intersect[used].tolist(),
        "pred": result.areas.pred[used].tolist(),
        "label": result.areas.label[used].tolist(),
        **panoptic,
        "times_ms": {key: round(value, 4) for key, value in result.times_ms.items()},
    }


def result_of(content: dict[str, Any], num_classes: int) -> ImageResult:
    """The finished image of a line's content; raises one of several errors where it is none."""

    def spread(part: dict[str, Any], name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        used, values = torch.tensor(part["classes"], dtype=torch.int64), torch.tensor(part[name], dtype=dtype)
        return torch.zeros(num_classes, dtype=dtype).index_put((used,), values)

    areas = Areas(spread(content, "intersect"), spread(content, "pred"), spread(content, "label"))
    quality, part = None, content.get("panoptic")
    if part is not None:
        quality = Quality(spread(part, "iou", torch.float64), *(spread(part, name) for name in ("tp", "fp", "fn")))
    return ImageResult(content["index"], content["name"], areas, content["times_ms"], quality)


def _quality_entry(quality: Quality) -> dict[str, Any]:
    used = (quality.tp + quality.fp + quality.fn > 0).nonzero()[:, 0]
    return {"classes": used.tolist(), **{name: part[used].tolist() for name, part in quality._asdict().items()}}
