"""A training before its first iteration: everything that can be known, and refused, before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.errors import UsageError
from ovbench.hashing import sha256_of, sha256_of_file
from ovbench.paths import cache_dir, user_path
from ovbench.train import processes
from ovbench.train import record as records
from ovbench.train.record import TrainSpec

if TYPE_CHECKING:
    from ovbench.models.trainable import ParameterGroup
    from ovbench.train.network import Subject

DEMO: dict[str, Any] = {
    "images": 16, "train_images": 64, "seed": 20261121, "long_tail": 1.0, "classes": 24, "size": (96, 128),
}  # fmt: skip
# A minute or two on a CPU. Without colour jitter, because colour is what tells generated classes apart.
DEMO_RECIPE = {"crop": 64, "resize": (128, 96), "photometric": False, "ratio_range": (0.75, 1.5)}
DEMO_CLOSED_SET = {"iters": 300, "batch": 8, "lr": 0.02, "weight_decay": 5e-4}
DEMO_OPEN_VOCABULARY = {"iters": 60, "batch": 2, "lr": 1e-3}


@dataclass(frozen=True)
class TrainOptions:
    """Where things lie and how they are worked through; nothing here can move the weights.

    Attributes:
        data_root: Folder of the dataset; None only for demos.
        results: Root folder of the trainings.
        resume: Continue the newest unfinished training of the same spec.
        workers: Processes that read images; None chooses.
        checkpoint_every: Iterations between checkpoints.
        val_every: Iterations between validations; None: none.
        tensorboard: Also write the losses for TensorBoard.
        launcher: What started the processes: none, pytorch (torchrun) or slurm.
        command: Command line for the record.
        on_iteration: Progress callback (done, total, learning rate, losses by name).
        on_count: Progress callback (done, total) of label files that are counted.
        on_message: Receives notices for the user.
    """

    data_root: Path | None = None
    results: Path = records.DEFAULT_ROOT
    resume: bool = False
    workers: int | None = None
    checkpoint_every: int = 1000
    val_every: int | None = None
    tensorboard: bool = False
    launcher: str = "none"
    command: str | None = None
    on_iteration: Callable[[int, int, float, dict[str, float]], None] = lambda done, total, lr, losses: None
    on_count: Callable[[int, int], None] = lambda done, total: None
    on_message: Callable[[str], None] = lambda text: None


@dataclass
class Plan:
    """A training before its first iteration.

    Attributes:
        spec: With everything filled in.
        parts: Parameters by part.
        benchmark: The training split.
        root: Where it lies.
        subject: The network.
        groups: What is trained.
        subset: Names of the images that are used by index, where those are not all.
    """

    spec: TrainSpec
    parts: tuple[records.PartReport, ...]
    benchmark: Benchmark
    root: Path
    subject: Subject
    groups: list[ParameterGroup] = field(repr=False)
    subset: dict[int, str] | None = field(repr=False, default=None)


def plan(
    method: str,
    dataset: str,
    *,
    arch: str | None = None,
    weights: str | None = None,
    method_options: dict[str, Any] | None = None,
    recipe_file: Path | None = None,
    changes: dict[str, str] | None = None,
    sentences: str | None = None,
    limit_iters: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    demo: bool = False,
    init: str | None = None,
    new_classes: bool = False,
    options: TrainOptions | None = None,
) -> Plan:
    """Everything of a training that can be known, and refused, before it starts.

    Args:
        method: Method id.
        dataset: Benchmark id; it must have a training split.
        arch: Encoder; None takes the method's default.
        weights: What training starts from: of a closed-set method ``random`` (None) or a file for the encoder; of others
            CLIP's weights, None being OpenAI's.
        method_options: Switches of the method.
        recipe_file: Fields that replace those of the method's recipe.
        changes: Fields as text.
        sentences: How words become sentences, for methods that read words; None: as the method's protocol has it.
        limit_iters: Stop after so many iterations of the schedule.
        seed: Of everything that is drawn.
        device: Torch device.
        demo: On generated scenes, with a small encoder.
        init: File with a whole closed-set network to start from.
        new_classes: What depends on the classes may begin anew then.
        options: Where things lie.

    Raises:
        UsageError, DataError, WeightsError: Unknown names, bad values, missing data or files.
    """
    from ovbench import benchmarks
    from ovbench.models.build import require_device
    from ovbench.registry import method_info
    from ovbench.train import accumulation
    from ovbench.train import network as subjects
    from ovbench.train.data import chosen_images
    from ovbench.train.recipe import ANY
    from ovbench.train.recipe import recipe as recipe_of

    where = options or TrainOptions()
    info = method_info(method)
    declared = subjects.recipes(method)
    benchmark = benchmarks.get(dataset).for_split("train")
    closed = not info.takes_words
    if weights is None:
        weights = "random" if closed else "builtin" if demo else "openai"
    if demo:
        arch = arch or ("tiny" if closed else None)
        own = declared.get(benchmark.name, declared.get(ANY, {}))
        kept = {key: value for key, value in own.items() if key != "epochs"}
        small = {**DEMO_RECIPE, **(DEMO_CLOSED_SET if closed else DEMO_OPEN_VOCABULARY)}
        declared = {benchmark.name: {**kept, **small}}
        method_options = {**subjects.trial_options(method), **(method_options or {})}
    if device == "cpu":  # which has no loss scaling
        declared = {
            name: {**fields, "amp": "off"} if fields.get("amp") == "float16" else fields
            for name, fields in declared.items()
        }
    recipe, moved = recipe_of(declared, benchmark.name, recipe_file, changes)
    require_device(device)
    rank, world = processes.join(where.launcher, device)
    if recipe.batch % world:
        raise UsageError(f"A batch of {recipe.batch} images cannot be split over {world} processes: --set batch=...")
    with processes.first_alone(where.launcher, rank):
        root, synthetic = _data(benchmark, where, demo)
    if where.val_every is not None:
        benchmarks.get(dataset).pairs(root)  # missing images are told now, not at the first validation
    fingerprint = benchmark.fingerprint(root)
    names = [pair.stem for pair in benchmark.pairs(root)]
    used = chosen_images(len(names), recipe.data_fraction, seed)
    subset = None if used is None else {index: names[index] for index in used}
    images = len(names if subset is None else subset)
    chosen = dict(method_options or {})
    frequencies = None
    if subjects.needs_class_frequencies(method, chosen):
        if subset is not None:
            raise UsageError(
                f"'{method}' weighs classes by how frequent they are in all training images: leave data_fraction away."
            )
        from ovbench.benchmarks.frequencies import class_pixels

        with processes.first_alone(where.launcher, rank):  # the others find them counted
            frequencies = class_pixels(benchmark, root, progress=where.on_count).tolist()
    if closed:
        if sentences is not None:
            raise UsageError(f"--prompts is for methods that read words: '{method}' has a fixed list of classes.")
        subject = subjects.closed_set_subject(
            method,
            chosen,
            arch,
            weights,
            benchmark.num_classes,
            seed=seed,
            device=device,
            class_frequencies=frequencies,
            init=init,
            class_names=benchmark.class_names,
            new_classes=new_classes,
        )
    else:
        if init is not None:
            raise UsageError(f"--init is for closed-set methods: '{method}' starts from its own file with --weights.")
        subject = subjects.open_vocabulary_subject(
            method, chosen, arch, weights, benchmark, sentences=sentences, seed=seed, device=device
        )
    groups, parts = subjects.choose_parameters(
        subject.network, recipe.policy, head_lr_mult=recipe.head_lr_mult, norm_decay=recipe.norm_decay
    )
    accumulation.prepare(subject.network, recipe, world)
    spec = TrainSpec(
        method=info.name,
        method_options={**subject.options, **info.recorded()},
        arch=subject.arch,
        weights=Path(weights).name if user_path(weights).is_file() else weights,
        weights_sha256=subject.weights_sha256,
        init=None if init is None else user_path(init).name,
        init_sha256=None if init is None else sha256_of_file(user_path(init)),
        **subject.text,
        dataset=benchmark.name,
        dataset_version=benchmark.version,
        dataset_fingerprint=fingerprint,
        images=images,
        subset_sha256=None if subset is None else sha256_of(list(subset.values())),
        recipe=recipe,
        overrides=moved,
        planned=recipe.iterations(images),
        limit_iters=limit_iters,
        seed=seed,
        device=device.split(":")[0],
        processes=world,
        demo=synthetic,
    )
    return Plan(spec, parts, benchmark, root, subject, groups, subset)


def _data(benchmark: Benchmark, options: TrainOptions, demo: bool) -> tuple[Path, bool]:
    """The data root, and whether its images are generated."""
    from ovbench.benchmarks.synth.copies import is_synthetic, synth

    if demo and options.data_root is None:
        home = cache_dir() / "demo" / f"{benchmark.name}-v{benchmark.version}-train-{DEMO['train_images']}"
        return benchmark.resolve_root(synth(benchmark.name, home, **DEMO)), True
    if options.data_root is None:
        raise UsageError(
            f"Where is {benchmark.title}? Give its folder with --data-root DIR (see 'ovbench list datasets'), or try "
            "the tool on generated scenes with --demo."
        )
    root = benchmark.resolve_root(user_path(options.data_root))
    return root, is_synthetic(root)
