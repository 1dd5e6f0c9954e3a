"""One training from a spec to weights: data found, network built, trained, saved, recorded; what stops it can be resumed."""

from __future__ import annotations

import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from ovbench import trained_weights
from ovbench.errors import Interrupted, OvbenchError, RunError, UsageError
from ovbench.hashing import sha256_of_file
from ovbench.paths import cache_dir
from ovbench.results import store
from ovbench.results.record import Environment
from ovbench.train import record as records
from ovbench.train.record import TrainRecord, TrainSpec

DEMO: dict[str, Any] = {
    "images": 16, "train_images": 64, "seed": 20261121, "long_tail": 1.0, "classes": 24, "size": (96, 128),
}  # fmt: skip
# A minute or two on a CPU. Without colour jitter, because colour is what tells generated classes apart.
DEMO_RECIPE = {"crop": "64", "resize": "128,96", "photometric": "false", "ratio_range": "0.75,1.5"}
DEMO_CLOSED_SET = {"iters": "300", "batch": "8", "lr": "0.02", "weight_decay": "0.0005"}
DEMO_OPEN_VOCABULARY = {"iters": "60", "batch": "2", "lr": "0.001"}


@dataclass(frozen=True)
class TrainOptions:
    """Where things lie and how they are worked through; nothing here can move the weights.

    Attributes:
        data_root: Folder of the dataset; None only for demos.
        results: Root folder of the trainings.
        resume: Continue the newest unfinished training of the same spec.
        workers: Processes that read images; None chooses.
        checkpoint_every: Iterations between checkpoints.
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
    """

    spec: TrainSpec
    parts: tuple[records.PartReport, ...]
    benchmark: Any
    root: Path
    subject: Any
    groups: Any = field(repr=False, default=None)


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
        options: Where things lie.

    Raises:
        UsageError, DataError, WeightsError: Unknown names, bad values, missing data or files.
    """
    from ovbench import benchmarks
    from ovbench.model import require_device
    from ovbench.registry import method_info
    from ovbench.train import subject as subjects
    from ovbench.train.recipe import recipe as recipe_of

    where = options or TrainOptions()
    info = method_info(method)
    declared = subjects.recipes(method)
    benchmark = benchmarks.get(dataset).for_split("train")
    given = dict(changes or {})
    closed = subjects.is_closed_set(method)
    if weights is None:
        weights = "random" if closed else "builtin" if demo else "openai"
    if demo:
        arch = arch or ("tiny" if closed else None)
        if "epochs" in given:
            given = {"iters": "none", **given}
        given = {**DEMO_RECIPE, **(DEMO_CLOSED_SET if closed else DEMO_OPEN_VOCABULARY), **given}
        method_options = {**subjects.trial_options(method), **(method_options or {})}
    recipe, moved = recipe_of(declared, benchmark.name, recipe_file, given)
    require_device(device)
    processes = _world(where.launcher)[1]
    if recipe.batch % processes:
        raise UsageError(
            f"A batch of {recipe.batch} images cannot be split over {processes} processes: --set batch=..."
        )
    root, synthetic = _data(benchmark, where, demo)
    fingerprint = benchmark.fingerprint(root)
    images = len(benchmark.pairs(root))
    chosen = dict(method_options or {})
    frequencies = None
    if subjects.needs_class_frequencies(method, chosen):
        from ovbench.benchmarks.frequencies import class_pixels

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
        )
    else:
        subject = subjects.open_vocabulary_subject(
            method, chosen, arch, weights, benchmark, sentences=sentences, seed=seed, device=device
        )
    groups, parts = subjects.choose_parameters(subject.network, recipe.policy)
    spec = TrainSpec(
        method=info.name,
        method_options={**subject.options, **info.recorded()},
        arch=subject.arch,
        weights=Path(weights).name if Path(weights).expanduser().is_file() else weights,
        weights_sha256=subject.weights_sha256,
        **subject.text,
        dataset=benchmark.name,
        dataset_version=benchmark.version,
        dataset_fingerprint=fingerprint,
        images=images,
        recipe=recipe,
        overrides=moved,
        planned=recipe.iterations(images),
        limit_iters=limit_iters,
        seed=seed,
        device=device.split(":")[0],
        processes=processes,
        demo=synthetic,
    )
    return Plan(spec, parts, benchmark, root, subject, groups)


def train(planned: Plan, options: TrainOptions | None = None) -> tuple[TrainRecord, Path]:
    """Trains, and returns the record and the folder with ``model.safetensors``.

    Raises:
        RunError: NaN, no memory, no disk; the last checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written after the iteration in flight.
    """
    where = options or TrainOptions()
    spec = planned.spec
    rank, world = _world(where.launcher)
    lead = rank == 0
    spec_hash = spec.spec_hash()
    home = where.results / store.path_name(spec.method) / store.path_name(spec.dataset)
    store.ensure_writable(where.results)
    folder = records.unfinished(home, spec_hash) if where.resume else None
    if where.resume and folder is None and lead:
        where.on_message("Nothing to resume for this spec: a new training starts.")
    started = datetime.now(timezone.utc)
    if folder is None:
        folder = home / records.new_id(spec_hash, started)
    folder = Path(_agreed(str(folder), where.launcher))
    with records.held(folder) if lead else nullcontext():
        return _train(planned, where, folder, started, rank, world)


def _train(
    planned: Plan, where: TrainOptions, folder: Path, started: datetime, rank: int, world: int
) -> tuple[TrainRecord, Path]:
    """:func:`train` in its folder."""
    from ovbench.evaluate.session import quiet_work_folder
    from ovbench.profile.environment import environment, git_state, package_versions
    from ovbench.profile.timing import peak_memory, reset_peak_memory
    from ovbench.train import checkpoint
    from ovbench.train.curves import plot_losses
    from ovbench.train.data import training_set
    from ovbench.train.runner import Journal, build_runner

    spec, network, lead = planned.spec, planned.subject.network, rank == 0
    spec_hash = spec.spec_hash()
    earlier = records.read(folder / records.RECORD) if (folder / records.RECORD).exists() else None
    found = checkpoint.checkpoints(folder / records.CHECKPOINTS)
    done = found[-1][0] if found else 0
    state = TrainRecord(
        train_id=folder.name,
        spec=spec,
        spec_hash=spec_hash,
        status="running",
        iterations=done,
        resumed=0 if earlier is None else earlier.resumed + 1,
        parts=planned.parts,
        environment=Environment(**environment(spec.device)),
        **git_state(),
        package_versions=package_versions(),
        command=where.command or "python",
        started=started if earlier is None else earlier.started,
    )
    if lead:
        records.write(state, folder)
        where.on_message(
            f"{'Resuming' if done else 'Training'} {folder.name}" + (f" from iteration {done}" if done else "")
        )
    log = records.LossLog(folder / records.LOSSES, done) if lead else None
    board = _board(folder, where) if lead else None
    times: list[float] = []
    last: dict[str, float] = {}
    clock = [perf_counter()]

    def on_losses(iteration: int, lr: float, losses: dict[str, float]) -> None:
        now = perf_counter()
        times.append(now - clock[0])
        clock[0] = now
        last.clear()
        last.update(losses)
        if log is not None:
            log.add(iteration, lr, losses)
        if board is not None:
            for name, value in {**losses, "lr": lr}.items():
                board.add_scalar(name, value, iteration)
        where.on_iteration(iteration, spec.stop, lr, losses)

    journal = Journal(folder / records.CHECKPOINTS, where.checkpoint_every, on_losses, done)
    reset_peak_memory(next(network.parameters()).device)
    status, reason, failure = "ok", None, None
    runner: Any = None
    try:
        with quiet_work_folder() as work_dir, _graceful(journal):
            if spec.recipe.sync_bn and world > 1 and spec.device == "cuda":
                import torch

                network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
            runner = build_runner(
                network,
                planned.groups,
                spec.recipe,
                training_set(planned.benchmark, planned.root, spec.recipe, spec.seed),
                journal,
                seed=spec.seed,
                planned=spec.planned,
                stop=spec.stop,
                device=spec.device,
                workers=_workers(spec.device) if where.workers is None else where.workers,
                work_dir=Path(work_dir),
                launcher=where.launcher,
                rank=rank,
                world=world,
            )
            runner.resume_from = found[-1][1] if found else None
            clock[0] = perf_counter()
            runner.train()
        if lead:
            trained_weights.save(
                folder / records.WEIGHTS, planned.subject.exported(runner.averaged_state()), _about(spec, state)
            )
    except KeyboardInterrupt:
        status, reason = "interrupted", "interrupted by the user or the scheduler"
    except Exception as error:
        failure = _clear(error)
        status, reason = "failed", str(failure)
    finally:
        if log is not None:
            log.close()
        if board is not None:
            board.close()
    memory = peak_memory(next(network.parameters()).device)
    weights = folder / records.WEIGHTS
    state = state.model_copy(
        update={
            "status": status,
            "reason": reason,
            "iterations": journal.iteration,
            "seconds_per_iteration": statistics.median(times) if times else None,
            "peak_memory_mib": memory[0] if memory else None,
            "peak_memory_kind": memory[1] if memory else None,
            "final_losses": dict(last),
            "weights_sha256": sha256_of_file(weights) if status == "ok" and lead else None,
            "finished": datetime.now(timezone.utc),
        }
    )
    if lead:
        records.write(state, folder)
        title = f"{spec.method} on {spec.dataset}, {spec.arch}" + (" - generated scenes" if spec.demo else "")
        try:
            plot_losses({"": folder / records.LOSSES}, folder / records.CURVES, title)
        except OSError as error:  # a picture must not hide how the training ended
            where.on_message(f"No picture of the losses: {error}.")
    if status == "interrupted":
        raise Interrupted(f"Interrupted after {journal.iteration} iterations; continue with --resume. Folder: {folder}")
    if failure is not None:
        failure.args = (f"{failure} Folder of the failed training: {folder}",)
        raise failure
    return state, folder


def part(launcher: str) -> bool:
    """Ends the processes' being together after a training; True in the one that goes on alone."""
    if launcher == "none":
        return True
    import torch

    first = torch.distributed.get_rank() == 0
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return first


def _about(spec: TrainSpec, state: TrainRecord) -> trained_weights.About:
    from ovbench import benchmarks

    return trained_weights.About(
        method=spec.method,
        method_options=spec.method_options,
        arch=spec.arch,
        dataset=spec.dataset,
        class_names=list(benchmarks.get(spec.dataset).class_names),
        training=state.train_id,
        spec_hash=state.spec_hash,
        iterations=spec.stop,
        planned=spec.planned,
        overrides=[f"{name}={getattr(spec.recipe, name)}" for name in spec.overrides],
        demo=spec.demo,
    )


def _data(benchmark: Any, options: TrainOptions, demo: bool) -> tuple[Path, bool]:
    """The data root, and whether its images are generated."""
    from ovbench.benchmarks.synth import is_synthetic, synth

    if demo and options.data_root is None:
        home = cache_dir() / "demo" / f"{benchmark.name}-v{benchmark.version}-train-{DEMO['train_images']}"
        return benchmark.resolve_root(synth(benchmark.name, home, **DEMO)), True
    if options.data_root is None:
        raise UsageError(
            f"Where is {benchmark.title}? Give its folder with --data-root DIR (see 'ovbench list datasets'), or try "
            "the tool on generated scenes with --demo."
        )
    root = benchmark.resolve_root(Path(options.data_root).expanduser())
    return root, is_synthetic(root)


def _workers(device: str) -> int:
    from ovbench.evaluate.run import default_workers

    return default_workers(device)


def _world(launcher: str) -> tuple[int, int]:
    """Number of this process and of all processes, joined to the others now."""
    if launcher == "none":
        return 0, 1
    from ovbench.compat import prepare

    prepare()
    import torch
    from mmengine.dist import get_rank, get_world_size, init_dist, is_distributed

    if not is_distributed():
        if torch.cuda.is_available():
            init_dist(launcher, backend="nccl")
        elif launcher == "pytorch":
            torch.distributed.init_process_group("gloo")  # mmengine's way asks for a GPU
        else:
            raise UsageError(
                "--launcher slurm trains on GPUs, and there is none. On CPUs: torchrun and --launcher pytorch."
            )
    return get_rank(), get_world_size()


def _agreed(text: str, launcher: str) -> str:
    """The first process' text, in all processes."""
    if launcher == "none":
        return text
    from mmengine.dist import broadcast_object_list

    box = [text]
    broadcast_object_list(box)
    return box[0]


def _board(folder: Path, options: TrainOptions) -> Any:
    if not options.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs the package tensorboard: pip install 'ovbench[track]'.") from None
    return SummaryWriter(str(folder / "tensorboard"))


@contextmanager
def _graceful(journal: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM let the iteration in flight finish, so that a whole state can be saved; a second one does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        if journal.stop_asked:
            raise KeyboardInterrupt
        journal.stop_asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clear(error: Exception) -> OvbenchError:
    """The error as one for users."""
    from ovbench.evaluate.run import clear_error

    if "Expected more than 1 value per channel" in str(error):
        return RunError("Batch norm needs at least two images per process: --set batch=2 or more.")
    if "out of memory" in str(error).lower():
        return RunError(
            f"Out of memory: {str(error).splitlines()[0]} Use a smaller batch or crop (--set batch=..., --set crop=...), or "
            "--set amp=bfloat16."
        )
    return clear_error(error)
