"""One training from a plan to weights: trained, saved, recorded; what stops it can be resumed."""

from __future__ import annotations

import signal
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from ovbench.errors import Interrupted, OvbenchError, RunError, UsageError
from ovbench.hashing import sha256_of_file
from ovbench.models import trained_file
from ovbench.results import store
from ovbench.results.record import Environment, new_run_id
from ovbench.train import processes
from ovbench.train import record as records
from ovbench.train.network import trained_words
from ovbench.train.plan import Plan, TrainOptions
from ovbench.train.recipe import SAME_WEIGHTS
from ovbench.train.record import TrainRecord, TrainSpec


def train(planned: Plan, options: TrainOptions | None = None) -> tuple[TrainRecord, Path]:
    """Trains, and returns the record and the folder with ``model.safetensors``.

    With ``resume``, a training of the same spec that has ended well is returned as it is.

    Raises:
        RunError: NaN, no memory, no disk; the last checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written after the iteration in flight.
    """
    where = options or TrainOptions()
    spec = planned.spec
    rank, world = processes.join(where.launcher, spec.device)
    lead = rank == 0
    spec_hash = spec.spec_hash()
    home = where.results / store.path_name(spec.method) / store.path_name(spec.dataset)
    store.ensure_writable(where.results)
    ended = records.finished(home, spec_hash) if where.resume else None
    if ended is not None:
        where.on_message(
            f"Trained already: {ended[0].iterations} of {spec.planned} iterations, {ended[1]}. Nothing is left to resume; "
            "without --resume a new training starts."
        )
        return ended
    folder = records.unfinished(home, spec_hash) if where.resume else None
    ended_before = records.shorter(home, spec) if where.resume and folder is None else None
    if ended_before is not None:
        raise UsageError(
            f"'{ended_before}' has ended, and its learning rate with it. More iterations are another schedule: going on from "
            "there would be a warm restart, whose weights no training in one go would give. Without --resume a new training "
            "starts; with --init it starts from those weights, and its record says so."
        )
    if where.resume and folder is None and lead:
        where.on_message("Nothing to resume for this spec: a new training starts.")
    started = datetime.now(timezone.utc)
    if folder is None:
        folder = home / new_run_id(spec_hash, started)
    folder = Path(processes.agreed(str(folder), where.launcher))
    with records.held(folder) if lead else nullcontext():
        return _train(planned, where, folder, started, rank, world)


def _train(
    planned: Plan, where: TrainOptions, folder: Path, started: datetime, rank: int, world: int
) -> tuple[TrainRecord, Path]:
    """:func:`train` in its folder."""
    from ovbench.evaluate.session import quiet_work_folder
    from ovbench.evaluate.state import default_workers
    from ovbench.measure.environment import environment, git_state, package_versions
    from ovbench.measure.timing import peak_memory, reset_peak_memory
    from ovbench.train import checkpoint
    from ovbench.train.curves import plot_losses, plot_validation
    from ovbench.train.data import training_set
    from ovbench.train.runner import Journal, build_runner
    from ovbench.train.validation import Validation

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
        start=planned.subject.start,
        environment=Environment(**environment(spec.device)),
        **git_state(),
        package_versions=package_versions(),
        command=where.command or "python",
        started=started if earlier is None else earlier.started,
    )
    if lead:
        records.write(state, folder)
        if planned.subset is not None:
            (folder / records.SUBSET).write_text(
                "".join(f"{name}\n" for name in planned.subset.values()), encoding="utf-8"
            )
        if planned.subject.start is not None:
            where.on_message(planned.subject.start)
        where.on_message(
            f"{'Resuming' if done else 'Training'} {folder.name}" + (f" from iteration {done}" if done else "")
        )
    last: dict[str, float] = {}
    for line in records.read_losses(folder / records.LOSSES):
        if line["iteration"] == done:
            last = {name: value for name, value in line.items() if name not in ("iteration", "lr")}
    log = records.LossLog(folder / records.LOSSES, done) if lead else None
    board = _board(folder, where) if lead else None
    times: list[float] = []
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

    def save(path: Path, runner: Any, iteration: int) -> None:
        state_dict = planned.subject.exported(runner.averaged_state())
        trained_file.save(path, state_dict, _about(spec, state, iteration))

    def validate(runner: Any, iteration: int) -> None:
        assert validation is not None  # only called with one
        if validation.due(iteration):
            validation(runner, iteration, lambda: world == 1 and journal.stop_asked)
            clock[0] = perf_counter()  # not the time of an iteration

    journal = Journal(folder / records.CHECKPOINTS, where.checkpoint_every, on_losses, done)
    validation = Validation(planned, where, folder, done, save) if lead else None
    if validation is not None:
        journal.validate = validate
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
                training_set(
                    planned.benchmark,
                    planned.root,
                    spec.recipe,
                    spec.seed,
                    segments=planned.benchmark.panoptic is not None and planned.subject.takes_segments,
                    chosen=None if planned.subset is None else tuple(planned.subset),
                ),
                journal,
                seed=spec.seed,
                planned=spec.planned,
                stop=spec.stop,
                device=spec.device,
                workers=default_workers(spec.device) if where.workers is None else where.workers,
                work_dir=Path(work_dir),
                launcher=where.launcher,
                rank=rank,
                world=world,
            )
            runner.resume_from = found[-1][1] if found else None
            clock[0] = perf_counter()
            runner.train()
        if lead:
            save(folder / records.WEIGHTS, runner, spec.stop)
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
            **({} if validation is None else validation.summary()),
            "finished": datetime.now(timezone.utc),
        }
    )
    if lead:
        records.write(state, folder)
        title = f"{spec.method} on {spec.dataset}, {spec.arch}" + (" - generated scenes" if spec.demo else "")
        try:
            plot_losses({"": folder / records.LOSSES}, folder / records.CURVES, title)
            plot_validation(state.validation, folder / records.VALIDATION_CURVE, title)
        except OSError as error:  # a picture must not hide how the training ended
            where.on_message(f"No picture of the losses: {error}.")
    if status == "interrupted":
        raise Interrupted(f"Interrupted after {journal.iteration} iterations; continue with --resume. Folder: {folder}")
    if failure is not None:
        failure.args = (f"{failure} Folder of the failed training: {folder}",)
        raise failure
    return state, folder


def _about(spec: TrainSpec, state: TrainRecord, iterations: int) -> trained_file.About:
    from ovbench import benchmarks

    same = () if spec.recipe.norm_of_parts else SAME_WEIGHTS
    return trained_file.About(
        method=spec.method,
        method_options=spec.method_options,
        arch=spec.arch,
        dataset=spec.dataset,
        class_names=list(benchmarks.get(spec.dataset).class_names),
        words=trained_words(benchmarks.get(spec.dataset), spec.wording) if spec.wording else [],
        training=state.train_id,
        spec_hash=state.spec_hash,
        iterations=iterations,
        planned=spec.planned,
        overrides=[f"{name}={getattr(spec.recipe, name)}" for name in spec.overrides if name not in same],
        demo=spec.demo,
    )


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
    from ovbench.evaluate.faults import clear_error

    if "Expected more than 1 value per channel" in str(error):
        return RunError("Batch norm needs at least two images per process: --set batch=2 or more.")
    if "out of memory" in str(error).lower():
        return RunError(
            f"Out of memory: {str(error).splitlines()[0]} --set accumulate=2 (or more) and --set checkpoint_activations=true "
            "keep the recipe; else --set amp=bfloat16, a smaller batch or crop."
        )
    return clear_error(error)
