"""The thing that is profiled, built from a spec: its network, its parts, one forward, and a whole image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    from ovbench.models.patch_model import require_device

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
    config = method.head_config(arch, classes)
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
    from ovbench.ops.windows import windows
    from ovbench.registry import CLOSED_SET, method_info

    assert spec.protocol is not None  # the launcher fills it in
    info = method_info(spec.method)
    model, parts, found = (_closed_set if info.track == CLOSED_SET else _open_vocabulary)(spec, str(device))
    height, width = _input_size(spec)
    protocol = model.protocol
    side = max(height, width)
    boxes = windows(height, width, *((side, side) if protocol.mode == "whole" else (protocol.crop, protocol.stride)))
    window = (boxes[0][2] - boxes[0][0], boxes[0][3] - boxes[0][1])
    views = len(boxes)
    if model.takes_views:
        inputs = model.views((height, width))
        window, views = inputs[0], len(inputs)
    filled = spec.model_copy(
        update={
            **found,
            "method": info.name,
            "method_options": {**found["method_options"], **info.recorded()},
            "weights": Path(spec.weights).name if user_path(spec.weights).is_file() else spec.weights,
            "classes": model.num_classes,
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
            with torch.inference_mode(), _precision(spec, device):
                return model.run_network(ready)

        return step

    def image(batch: int) -> Step:
        images = list(pictures(batch, (height, width)))
        return lambda: model.predict_labels(images, [(height, width)] * batch)

    def watch(stopwatch: Stopwatch) -> None:
        model.stage = stopwatch.stage

    @contextmanager
    def countable() -> Iterator[None]:
        name = "network" if model.takes_words else "call"
        network = getattr(model, name)
        # what torch.compile was given
        setattr(model, name, getattr(network, "_torchdynamo_orig_callable", network))
        try:
            yield
        finally:
            setattr(model, name, network)

    trained = _trained(model, parts)
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
        windows=views,
        watch=watch,
        countable=countable,
        trained=trained,
    )


def _trained(model: Any, parts: dict[str, nn.Module]) -> dict[str, Parameters] | None:
    """Parameters by part while those have gradients that a mask-based method's own policy trains; None for others."""
    method: Any = getattr(model, "method", None)
    if not getattr(method, "POLICIES", ()):
        return None
    names = {name for group in method.parameter_groups() for name in group["params"]}
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name in names)
    sizes = by_part(model, parts)
    method.requires_grad_(False)
    if hasattr(method.clip, "join_projections"):
        method.clip.join_projections()
    return sizes


def _open_vocabulary(spec: ProfileSpec, device: str) -> tuple[Any, dict[str, nn.Module], dict[str, Any]]:
    """The model of a method on its CLIP, its parts, and what was found out for the spec."""
    from ovbench.models.method import random_backbones
    from ovbench.registry import method_class

    cls = method_class(spec.method)
    options = dict(spec.method_options)
    if spec.weights in {"random", "builtin"}:
        options = {**random_backbones(cls, options), **options}
    method = cls.load(
        spec.weights, spec.arch, cls.configure(options), activation=spec.activation, seed=spec.seed, device=device
    )
    model = cls.model_class()(
        method,
        _words(spec),
        spec.protocol,
        dtype=spec.dtype,
        window_batch=spec.window_batch,
        compile_mode=spec.compile_mode,
    )
    found = {
        "method_options": method.options(),
        "arch": method.clip.arch,
        "weights_sha256": method.clip.weights_sha256,
        "activation": method.clip.activation,
        "words": len(model.query_words),
    }
    return model, _parts(method), found


def _closed_set(spec: ProfileSpec, device: str) -> tuple[Any, dict[str, nn.Module], dict[str, Any]]:
    """As :func:`_open_vocabulary`, of a network for a fixed number of classes."""
    from ovbench import benchmarks
    from ovbench.models.closed_set_weights import build_closed_set_model

    classes: Sequence[str] = [f"class {number}" for number in range(spec.classes or DEFAULT_CLASSES)]
    if spec.dataset is not None and spec.classes is None:
        classes = benchmarks.get(spec.dataset).class_names
    model, loaded = build_closed_set_model(
        spec.method,
        classes=classes,
        weights=spec.weights,
        arch=spec.arch,
        protocol=spec.protocol,
        dtype=spec.dtype,
        device=device,
        window_batch=spec.window_batch,
        compile_mode=spec.compile_mode,
        seed=spec.seed,
        method_options=dict(spec.method_options),
    )
    found = {
        "method_options": loaded.method.options(),
        "arch": loaded.arch,
        "weights_sha256": loaded.weights_sha256,
    }
    return model, dict(loaded.network.segmentor.named_children()), found


def _precision(spec: ProfileSpec, device: torch.device) -> AbstractContextManager[Any]:
    from ovbench.models.windowed import DTYPES

    return nullcontext() if spec.dtype == "float32" else torch.autocast(device.type, dtype=DTYPES[spec.dtype])


def _words(spec: ProfileSpec) -> list[list[str]]:
    """The benchmark's words, or as many made-up ones as classes and words are asked for."""
    from ovbench import benchmarks

    if spec.dataset is not None and spec.classes is None:
        benchmark = benchmarks.get(spec.dataset)
        assert spec.protocol is not None
        wording = spec.protocol.wording if spec.protocol.wording in benchmark.wordings else benchmark.wordings[0]
        words: list[list[str]] = benchmark.words(wording)
        return words
    words = [[f"class {number}"] for number in range(spec.classes or DEFAULT_CLASSES)]
    words[-1] += [f"synonym {number}" for number in range((spec.words or 0) - len(words))]
    return words


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


def _parts(method: nn.Module) -> dict[str, nn.Module]:
    """The method's networks, CLIP as its two towers; what both towers share or none holds comes out as ``other``."""
    from ovbench.networks.dense_clip import DenseCLIP

    parts: dict[str, nn.Module] = {}
    for name, child in method.named_children():
        if isinstance(child, DenseCLIP):
            parts[f"{name}.visual"] = child.visual
            parts[f"{name}.text"] = child.clip  # the vision tower is counted already
        else:
            parts[name] = child
    return parts
