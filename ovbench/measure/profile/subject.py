"""The thing that is profiled, built from a spec: its network, its parts, one forward, and a whole image."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovbench.errors import UsageError
from ovbench.measure.parameters import Parameters, by_part
from ovbench.measure.profile.record import ProfileSpec
from ovbench.measure.timing import Stopwatch
from ovbench.paths import user_path
from ovbench.words.class_list import Classes

Step = Callable[[], object]

DEFAULT_CLASSES = 21  # VOC with background


@dataclass(frozen=True)
class Subject:
    """What figures are taken of.

    Attributes:
        spec: The spec with everything filled in.
        network: All parameters.
        parts: Parts by name, in the order in which a shared parameter is given to them.
        device: Where it runs.
        forward: Batch -> one network forward on that many inputs.
        forward_input: Shape of one input in words.
        image: Batch -> that many whole images; None where the forward is all there is.
        windows: Forwards per whole image.
        watch: Makes the stages that the model names go to a stopwatch.
        countable: Within it the steps run uncompiled, so that every operation can be seen.
        trained: Parameters by part under the policy that the method's recipes train; None: as they stand.
    """

    spec: ProfileSpec
    network: nn.Module
    parts: dict[str, nn.Module]
    device: torch.device
    forward: Callable[[int], Step]
    forward_input: str
    image: Callable[[int], Step] | None
    windows: int | None
    watch: Callable[[Stopwatch], None]
    countable: Callable[[], AbstractContextManager[None]] = nullcontext
    trained: dict[str, Parameters] | None = None


def build_subject(spec: ProfileSpec) -> Subject:
    """The subject of a spec, built on its device.

    Raises:
        UsageError: Unknown names or values that do not fit.
        WeightsError: The weights cannot be had or do not fit.
        RunError: A decode head without mmsegmentation.
    """
    from ovbench.models.build import require_device

    device = spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    spec = spec.model_copy(update={"device": device})
    return _head(spec, torch.device(device)) if spec.part == "decode_head" else _model(spec, torch.device(device))


def _head(spec: ProfileSpec, device: torch.device) -> Subject:
    """A closed-set decode head on random features of its encoder."""
    from ovbench.methods import closed_set, hosts  # type: ignore[import-not-found]
    from ovbench.mm.compat import import_mmseg
    from ovbench.registry import closed_set_class

    cls: Any = closed_set_class(spec.method)
    method = cls(spec.method, cls.configure(dict(spec.method_options)))
    arch = spec.arch or method.DEFAULT_ARCH
    grids = hosts.feature_grids(spec.features) if spec.features else hosts.default_grids(arch)
    classes = spec.classes or hosts.NUM_CLASSES
    config = method.head_config(arch, classes, training=True)  # with the teacher, as the papers count it
    models = import_mmseg().registry.MODELS
    closed_set.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        head = models.build(config).eval().to(device)

    def forward(batch: int) -> Step:
        generator = torch.Generator().manual_seed(spec.seed)
        shapes = hosts.feature_shapes(grids, batch, arch)
        maps = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

        def step() -> Tensor:
            with torch.inference_mode(), _precision(spec, device):
                logits: Tensor = head(maps)
                return logits

        return step

    written = ",".join(f"{h}x{w}" for h, w in grids)
    host = config.get("host", config)
    used = host["in_index"]
    used = list(used) if isinstance(used, list) else [0, used] if "c1_in_channels" in host else [used]
    shapes = ["x".join(map(str, shape)) for shape in hosts.feature_shapes(grids, encoder=arch)]
    filled = {"features": written, "classes": classes, "arch": arch, "method_options": method.options()}
    return Subject(
        spec=spec.model_copy(update=filled),
        network=head,
        parts=dict(head.named_children()),
        device=device,
        forward=forward,
        forward_input=", ".join(f"C{index + 1} {shapes[index]}" for index in used),
        image=None,
        windows=None,
        watch=lambda stopwatch: None,
    )


def _model(spec: ProfileSpec, device: torch.device) -> Subject:
    """A method with its classes under a protocol."""
    from ovbench.models.build import ModelSpec, build
    from ovbench.models.method import random_backbones
    from ovbench.registry import class_of

    assert spec.protocol is not None  # the launcher fills it in
    options = dict(spec.method_options)
    cls = class_of(spec.method)
    if spec.weights == "builtin":  # nothing is downloaded for a cost
        options = {**random_backbones(cls, options), **options}
    built = build(
        ModelSpec(
            spec.method,
            _classes(spec),
            spec.protocol,
            weights=spec.weights,
            arch=spec.arch,
            method_options=options,
            dtype=spec.dtype,
            device=str(device),
            window_batch=spec.window_batch,
            compile_mode=spec.compile_mode,
            activation=spec.activation,
            seed=spec.seed,
            background=_background(spec),
        )
    )
    model = built.model
    parts = model.parts()
    height, width = _input_size(spec)
    views = model.views((height, width))
    window = views[0]
    filled = spec.model_copy(
        update={
            **built.spec_fields(),
            "weights": Path(spec.weights).name if user_path(spec.weights).is_file() else spec.weights,
            "classes": model.num_classes,
            "words": len(model.query_words) if model.takes_words else None,
            "input": f"{height}x{width}",
        }
    )

    def pictures(batch: int, size: tuple[int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(spec.seed)
        return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)

    def forward(batch: int) -> Step:
        with torch.inference_mode():
            ready = model.network_input(pictures(batch, window))

        def step() -> object:
            with torch.inference_mode(), model.precision():
                return model.run_network(ready)

        return step

    def image(batch: int) -> Step:
        images = list(pictures(batch, (height, width)))
        return lambda: model.predict_labels(images, [(height, width)] * batch)

    def watch(stopwatch: Stopwatch) -> None:
        model.stage = stopwatch.stage

    trained = None
    policy = model.as_trained()
    if policy is not None:
        with policy:
            trained = by_part(model, parts)
    with torch.inference_mode():
        shape = model.network_input(pictures(1, window)).shape
    return Subject(
        spec=filled,
        network=model,
        parts=parts,
        device=device,
        forward=forward,
        forward_input="x".join(str(side) for side in shape),
        image=image,
        windows=len(views),
        watch=watch,
        countable=model.uncompiled,
        trained=trained,
    )


def _precision(spec: ProfileSpec, device: torch.device) -> AbstractContextManager[Any]:
    from ovbench.models.windowed import DTYPES

    return nullcontext() if spec.dtype == "float32" else torch.autocast(device.type, dtype=DTYPES[spec.dtype])


def _classes(spec: ProfileSpec) -> Classes:
    """The benchmark's words (or names, for a method that takes no words), or as many made-up ones as classes
    and words are asked for.
    """
    from ovbench import benchmarks
    from ovbench.registry import method_info

    if spec.dataset is None or spec.classes is not None:
        words = [[f"class {number}"] for number in range(spec.classes or DEFAULT_CLASSES)]
        words[-1] += [f"synonym {number}" for number in range((spec.words or 0) - len(words))]
        return words
    benchmark = benchmarks.get(spec.dataset)
    if not method_info(spec.method).takes_words:
        return list(benchmark.class_names)
    assert spec.protocol is not None
    wording = spec.protocol.wording if spec.protocol.wording in benchmark.wordings else benchmark.wordings[0]
    return benchmark.words(wording)


def _background(spec: ProfileSpec) -> int | None:
    """The benchmark's background; of made-up classes the first one."""
    from ovbench import benchmarks

    found = 0 if spec.dataset is None else benchmarks.get(spec.dataset).background
    return None if found is None else min(found, (spec.classes or found + 1) - 1)


def _input_size(spec: ProfileSpec) -> tuple[int, int]:
    """Whole image (h, w): as asked, else the protocol's short side at 4:3, the shape of most photos."""
    assert spec.protocol is not None
    if spec.input is not None:
        height, x, width = spec.input.partition("x")
        if not x or not height.isdigit() or not width.isdigit() or not int(height) or not int(width):
            raise UsageError(f"--input {spec.input!r}: give HEIGHTxWIDTH in pixels, e.g. 336x448.")
        return int(height), int(width)
    short = spec.protocol.short_side or 336
    return short, min(round(short * 4 / 3), spec.protocol.long_side)
