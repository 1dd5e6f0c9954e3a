"""A run as a plain mmengine config that mmseg's own ``TestLoop`` and ``IoUMetric`` evaluate to the same mIoU."""

from __future__ import annotations

import pprint
from pathlib import Path
from typing import Any

from ovbench.errors import RunError
from ovbench.evaluate.inputs import classes_of, data_of
from ovbench.evaluate.state import RunOptions
from ovbench.paths import user_path
from ovbench.spec import RunSpec

HEADER = '''"""{method} on {dataset}, written by 'ovbench run --dump-config'.

    from mmengine.config import Config
    from mmengine.runner import Runner
    Runner.from_cfg(Config.fromfile("{name}")).test()

Reading the config imports ovbench.mm.segmentor, which makes mmseg importable on mmcv-lite: do not import mmseg before.
"""
'''


def mmengine_config(spec: RunSpec, options: RunOptions) -> dict[str, Any]:
    """The config as plain data; needs the dataset to be there (its paths go in), but no weights.

    Raises:
        UsageError, DataError: Unknown names, or missing data.
    """
    from ovbench import benchmarks
    from ovbench.models.closed_set import views_inside
    from ovbench.models.resolve import resolve

    benchmark = benchmarks.get(spec.dataset)
    root, _ = data_of(benchmark, spec, options.data_root)
    path = user_path(spec.weights)
    resolved = resolve(spec.method, spec.weights, spec.method_options, demo=spec.demo)
    info = resolved.info
    # a method from a file is no type of mmseg's registry
    kind = (
        {"type": "OpenVocabSegmentor", "method": f"{info.source}:{info.cls}"}
        if ":" in info.name
        else {"type": info.name}
    )
    model: dict[str, Any] = {
        **kind,
        "classes": classes_of(benchmark, spec)[0],
        "weights": str(path.resolve()) if path.is_file() else spec.weights,
        "arch": spec.arch,
        "activation": spec.activation,
        "seed": spec.seed,
        "dtype": spec.dtype,
        "device": spec.device,
        "window_batch": spec.window_batch,
        "compile_mode": spec.compile_mode,
        "protocol": spec.protocol.model_dump(mode="json"),
        "method_options": resolved.chosen(),
    }
    if info.takes_words:
        model["background"] = benchmark.background
    short_side = 0 if views_inside(spec.protocol) else spec.protocol.short_side
    dataset = benchmark.dataset_cfg(root, short_side=short_side, long_side=spec.protocol.long_side)
    dataset["data_root"] = str(Path(dataset["data_root"]).resolve())
    if spec.limit is not None:
        dataset["indices"] = spec.limit
    loading = "label_loading" if benchmark.panoptic is None else "panoptic_dataset"
    imports = ["ovbench.mm.segmentor", f"ovbench.mm.{loading}"]
    return {
        "default_scope": "mmseg",
        "custom_imports": {"imports": imports, "allow_failed_imports": False},
        "model": model,
        "test_dataloader": {
            "batch_size": options.batch or 1,
            "num_workers": 0 if options.workers is None else options.workers,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": dataset,
        },
        "test_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"], "ignore_index": benchmark.ignore_index},
        "test_cfg": {"type": "TestLoop"},
        "work_dir": "work_dirs",
    }


def dump_config(spec: RunSpec, options: RunOptions, path: Path) -> Path:
    """Writes the config of a run to ``path`` (a ``.py`` file) and returns it.

    Raises:
        RunError: The file cannot be written.
    """
    lines = [HEADER.format(method=spec.method, dataset=spec.dataset, name=path.name)]
    for key, value in mmengine_config(spec, options).items():
        lines.append(f"{key} = {pprint.pformat(value, width=110, sort_dicts=False)}\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise RunError(f"Cannot write the config '{path}': {error.strerror}.") from error
    return path
