"""A finished record sent on to a tracker: TensorBoard, MLflow or Weights & Biases, through mmengine's own backends.

The record is stored before and is the truth; a tracker that fails costs a warning and nothing else.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovbench.errors import OvbenchWarning, UsageError, unknown_name
from ovbench.results import store
from ovbench.results.record import RunRecord

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""Trackers and the package that each needs."""

EXPERIMENT = "ovbench"
_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
_UNSAFE = re.compile(r"[^\w. /-]+", re.ASCII)  # MLflow allows nothing else in names, and others show them as they are


def require(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers of these names, each once; called before a run, so that none is found missing after it.

    Raises:
        UsageError: An unknown name, or its package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise unknown_name("tracker", name, PACKAGES)
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UsageError(f"--track {name} needs a package that is not installed: pip install {PACKAGES[name]}.")
    return tuple(dict.fromkeys(names))


def send(record: RunRecord, name: str, results: Path = store.DEFAULT_ROOT) -> str | None:
    """Sends a stored record to a tracker; returns where it went, or None after a warning that says why not.

    TensorBoard writes to ``track/tensorboard`` beside the records. MLflow goes where ``MLFLOW_TRACKING_URI`` points, else
    to a file store in ``track/mlflow``. Weights & Biases reads its own settings (``WANDB_API_KEY``, ``WANDB_MODE``).

    Args:
        record: What is sent: scalars, the spec as config, tags, and the gallery where the run has one.
        name: A key of :data:`PACKAGES`.
        results: Root folder of the records.
    """
    folder = results.parent / "track" / name
    try:
        return _SENDERS[name](record, folder, _gallery(record, results))
    except Exception as error:  # three foreign packages, a network and a disk: whatever it is, the record must stay
        lines = str(error).strip().splitlines()
        warnings.warn(
            f"The record is stored, but {name} did not take it: {type(error).__name__}: {lines[0] if lines else '-'}",
            OvbenchWarning,
            stacklevel=2,
        )
        return None


def scalars(record: RunRecord) -> dict[str, float]:
    """The figures of a record under the names that trackers show; those that it does not have are left out."""
    found: dict[str, float | None] = {}
    if record.metrics is not None:
        scores = record.metrics
        found |= {"accuracy/mIoU": scores.miou, "accuracy/mAcc": scores.macc, "accuracy/aAcc": scores.aacc}
        found["accuracy/images"] = float(scores.images)
        if scores.panoptic is not None:
            found |= {f"accuracy/{name.upper()}": getattr(scores.panoptic, name) for name in ("pq", "sq", "rq")}
        for index, score in enumerate(scores.classes):
            key = f"IoU/{_UNSAFE.sub('_', score.name)}"
            # two names may become one
            found[key if key not in found else f"{key} {index}"] = score.iou
    cost = record.efficiency
    if cost is not None:
        timings = {"latency_ms": cost.latency_ms, **{f"stage_ms/{key}": value for key, value in cost.stages_ms.items()}}
        found |= {
            f"efficiency/{_UNSAFE.sub('_', key)}": None if timing is None else timing.median
            for key, timing in timings.items()
        }
        found["efficiency/forward_gmacs"] = cost.gmacs
        for figure in ("images_per_s", "image_gmacs", "params_m", "trainable_params_m", "peak_memory_mib"):
            found[f"efficiency/{figure}"] = getattr(cost, figure)
    return {key: float(value) for key, value in found.items() if value is not None and math.isfinite(value)}


def tags(record: RunRecord) -> dict[str, str]:
    """What runs are filtered by; ``kind`` says whether a run is a result at all."""
    from ovbench.results.comparable import kind_of

    spec = record.spec
    return {
        "method": spec.method,
        "dataset": spec.dataset,
        "protocol": spec.protocol.name,
        "arch": spec.arch or "unknown",
        "weights": spec.weights,
        "dtype": spec.dtype,
        "device": spec.device,
        "status": record.status,
        "kind": " ".join(kind_of(record)) or "result",
        "run_id": record.run_id,
        "spec_hash": record.spec_hash,
        "git_commit": record.provenance.git_commit or "unknown",
    }


def _config(record: RunRecord) -> dict[str, Any]:
    return {**record.spec.model_dump(mode="json"), "tags": tags(record)}


def _gallery(record: RunRecord, results: Path) -> Any:
    """The gallery (H, W, 3) as uint8, or None."""
    path = store.record_path(record, results).with_suffix("") / "gallery.png"
    if not path.is_file():
        return None
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _tensorboard(record: RunRecord, folder: Path, gallery: Any) -> str:
    from mmengine.config import Config
    from mmengine.visualization import TensorboardVisBackend

    home = folder / store.path_name(record.spec.method) / store.path_name(record.spec.dataset) / record.run_id
    backend = TensorboardVisBackend(save_dir=str(home))
    try:
        backend.add_config(Config(_config(record)))
        backend.add_scalars(scalars(record))
        if gallery is not None:
            backend.add_image("gallery", gallery)
    finally:
        backend.close()
    return f"{home} (tensorboard --logdir {folder})"


def _mlflow(record: RunRecord, folder: Path, gallery: Any) -> str:
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.visualization import MLflowVisBackend

    # The backend reopens the files of the current logger, which is the run's, whose folder is gone.
    MMLogger.get_instance(f"ovbench-track-{record.run_id}", log_level="ERROR")
    address = os.environ.get("MLFLOW_TRACKING_URI")
    if address is None:
        # Newer releases of MLflow refuse a plain folder unless told; a database would need its full package.
        os.environ.setdefault(_FILE_STORE, "true")
    with tempfile.TemporaryDirectory(prefix="ovbench-track-") as work:
        # Everything in the work folder becomes an artifact when the backend is closed.
        (Path(work) / "record.json").write_text(record.to_json(), encoding="utf-8")
        config = _config(record)
        labels = config.pop("tags")
        backend = MLflowVisBackend(
            save_dir=str(folder),
            exp_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT),
            run_name=record.run_id,
            tags=labels,
            tracking_uri=address,
            tracked_config_keys=list(config),
            artifact_suffix=(".json",),
        )
        status = "FAILED"
        try:
            backend.add_config(Config({**config, "work_dir": work}))
            backend.add_scalars(scalars(record))
            if gallery is not None:
                backend.add_image("gallery.png", gallery)
            backend.close()
            status = "FINISHED"
        finally:
            if status == "FAILED":
                _end_mlflow(status)
    return address or f"{folder} ({_FILE_STORE}=true mlflow ui --backend-store-uri {folder})"


def _end_mlflow(status: str) -> None:
    """Ends the run that a failed backend left open, or the next one would be written into it."""
    import mlflow

    mlflow.end_run(status)


def _wandb(record: RunRecord, folder: Path, gallery: Any) -> str:
    from mmengine.visualization import WandbVisBackend

    config = _config(record)
    labels = config.pop("tags")
    # The config goes in here and not through add_config, which would upload every Python file of the current folder.
    backend = WandbVisBackend(
        save_dir=str(folder),
        init_kwargs={
            "project": os.environ.get("WANDB_PROJECT", EXPERIMENT),
            "name": record.run_id,
            "config": {**config, "tags": labels},
            "tags": [f"{key}: {labels[key]}"[:64] for key in ("method", "dataset", "protocol", "kind")],
        },
    )
    try:
        backend.add_scalars(scalars(record))
        if gallery is not None:
            backend.add_image("gallery", gallery)
        run = backend.experiment.run
        return str(run.dir if run.offline else run.url)
    finally:
        if hasattr(backend, "_wandb"):  # else it was never begun, and asking for it would begin it
            backend.experiment.finish()  # the backend's own close() calls what newer releases do not have


_SENDERS: Mapping[str, Callable[[RunRecord, Path, Any], str]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
