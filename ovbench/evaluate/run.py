"""One run from a spec to a record: data found and checked, model built, images evaluated, figures measured, all stored.

Whatever ends a run early leaves a record that says so, and a shard file from which ``resume`` continues.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovbench.errors import Interrupted, RunError, UsageError
from ovbench.evaluate import ranks
from ovbench.evaluate.faults import clear_error
from ovbench.evaluate.signals import held_back
from ovbench.evaluate.state import RunOptions, State, metrics_of
from ovbench.paths import user_path
from ovbench.results import record as records
from ovbench.results import store
from ovbench.spec import Protocol, RunSpec, validated
from ovbench.words.class_list import Classes

if TYPE_CHECKING:
    from ovbench.models.build import Built

RECORDED = "Recorded already: "  # begins the message of a run that skip_recorded has ended


def run(spec: RunSpec | dict[str, Any], **options: Any) -> records.RunRecord:
    """Evaluates one method on one benchmark and stores the record.

    Args:
        spec: A spec, or a dict with at least ``method`` and ``dataset``.
        **options: Fields of :class:`RunOptions` (``data_root=``, ``results=``, ``batch=``, ``resume=`` ...).

    Returns:
        The record as stored, with ``skip_recorded`` perhaps by an earlier run.

    Raises:
        UsageError, DataError, WeightsError: Nothing was computed and no record written.
        RunError, Interrupted: The run ended early; finished images are kept and ``resume=True`` continues.
    """
    checked: RunSpec = validated(RunSpec, spec) if isinstance(spec, dict) else spec
    unknown = set(options) - set(RunOptions.__dataclass_fields__)
    if unknown:
        raise UsageError(
            f"Unknown run option {', '.join(sorted(unknown))}. Known: {', '.join(RunOptions.__dataclass_fields__)}."
        )
    for key in ("data_root", "results"):
        if options.get(key) is not None:
            options[key] = user_path(options[key])
    chosen = replace(RunOptions(), **options)
    if chosen.on_error not in ("stop", "skip"):
        raise UsageError(f"on_error is {chosen.on_error!r}; give 'stop' or 'skip'.")
    team = ranks.join(chosen.launcher)
    if not team.lead:  # one speaks for all
        chosen = replace(chosen, on_images=lambda done, total: None, on_message=lambda text: None)
    state = State(checked, chosen, datetime.now(timezone.utc), team=team)
    state.run_id = records.new_run_id(checked.spec_hash(), state.started)
    try:
        return _run(state)
    finally:
        if state.shard is not None:
            state.shard.close()
        team.leave()


def _run(state: State) -> records.RunRecord:
    """:func:`run`, whose end the other processes hear of."""
    team = state.team
    try:
        _evaluate(state)
        if not team.lead:
            return store.read(team.over())
    except KeyboardInterrupt as error:
        with held_back(deliver=False):
            where = _ended(state, error, "interrupted", "interrupted by the user or the scheduler")
        raise Interrupted(f"Interrupted. Finished images are kept; continue with --resume.{where}") from None
    except Exception as error:
        clear = clear_error(error)
        with held_back(deliver=False):
            where = _ended(state, clear, "failed", str(clear))
        clear.args = (f"{clear}{where}",)
        if clear is error:
            raise
        raise clear from error
    with held_back(deliver=False):  # a run that is being recorded has ended, whoever wants to interrupt it
        try:
            if state.recorded is not None:
                record, path = state.recorded, store.record_path(state.recorded, state.options.results)
            else:
                record, path = _store(state, "ok", state.partial_reason)
        except RunError as error:
            error.args = (f"{error} All images are done and kept; continue with --resume.",)
            team.failed(error)
            raise
        team.over(str(path.resolve()))
    return record


def _ended(state: State, error: BaseException, status: str, reason: str) -> str:
    """Tells the other processes, and records a run that ends early; returns where the record is."""
    from ovbench.evaluate.shards import others_of

    shard, team = state.shard, state.team
    if not team.lead and shard is not None:
        shard.close()  # before the first one hears of it
    team.failed(error)
    if not team.lead or shard is None:  # without a shard nothing was computed, and there is nothing to keep
        return ""
    try:
        for path in others_of(shard.path):
            shard.absorb(path, wait=10.0)
        _, stored = _store(state, status, reason)
    except RunError as second:
        return f" Besides: {second}"
    return f" Record of the {status} run: {stored}"


def _evaluate(state: State) -> None:
    from ovbench import benchmarks
    from ovbench.evaluate.inputs import classes_of, data_of
    from ovbench.registry import method_info

    spec, options = state.spec, state.options
    method_info(spec.method)  # unknown names before any work
    store.ensure_writable(options.results)
    state.benchmark = benchmark = benchmarks.get(spec.dataset)
    with state.team.first_alone():  # which fetches and makes what is not there yet
        root, synthetic = data_of(benchmark, spec, options.data_root)
        faulty = options.on_error == "skip"
        if options.check:
            from ovbench.benchmarks.check.checking import quick_check

            quick_check(spec.dataset, root, skip=faulty)
        state.fingerprint = benchmark.fingerprint(root, incomplete=faulty)
        classes, protocol = classes_of(benchmark, spec)
        built = _build(spec, classes, protocol, benchmark.background, options.cache_masks)
    if protocol.has_thresholds and benchmark.background:
        name = benchmark.class_names[benchmark.background]
        options.on_message(f"Thresholds leave pixels to the background, class {benchmark.background} ({name}).")
    state.add_partial_reason(built.partial)
    state.weights_sha256, state.constants = built.weights_sha256, built.constants
    path = user_path(spec.weights)
    state.spec = spec.model_copy(
        update={
            **built.spec_fields(),
            "arithmetic": built.arithmetic,
            "protocol": protocol,
            "dataset": benchmark.name,
            "dataset_version": benchmark.version,
            "weights": path.name if path.is_file() else spec.weights,
            "demo": built.demo or spec.demo or synthetic or spec.weights == "builtin",
        }
    )
    if options.skip_recorded and _is_recorded(state):
        return
    options.on_message(
        f"{state.spec.method} on {spec.dataset}: {state.spec.arch}, {spec.weights}, {spec.protocol.name} protocol"
        + (f", {state.team.world} processes" if state.team.world > 1 else "")
    )

    from ovbench.evaluate.session import evaluate_images

    evaluate_images(state, benchmark, root, built.model, synthetic=synthetic)


def _build(spec: RunSpec, classes: Classes, protocol: Protocol, background: int | None, cache_gib: float) -> Built:
    from ovbench.models.build import ModelSpec, build

    return build(
        ModelSpec(
            spec.method,
            classes,
            protocol,
            weights=spec.weights,
            arch=spec.arch,
            method_options=spec.method_options,
            dtype=spec.dtype,
            device=spec.device,
            window_batch=spec.window_batch,
            compile_mode=spec.compile_mode,
            activation=spec.activation,
            seed=spec.seed,
            demo=spec.demo,
            background=background,
            cache_masks=int(cache_gib * 2**30),
        )
    )


def _is_recorded(state: State) -> bool:
    """Whether there is a whole record of the same spec and data; the first process looks, for all."""
    options, found = state.options, None
    if state.team.lead:
        assert state.fingerprint is not None  # taken before the model was built
        found = state.recorded = store.find_whole(state.spec, state.fingerprint, options.results)
    if found is not None:
        options.on_message(f"{RECORDED}{store.record_path(found, options.results)}")
    recorded = bool(state.team.told({"recorded": found is not None}, "recorded")["recorded"])
    if recorded:  # the first process, and what it tells, stays until all have heard it
        state.team.shares(ranks.Share())
    return recorded


def _store(state: State, status: str, reason: str | None) -> tuple[records.RunRecord, Path]:
    from ovbench.measure.environment import environment, git_state, package_versions

    finished = datetime.now(timezone.utc)
    metrics = state.metrics
    if metrics is None and state.shard is not None and state.shard.done:
        metrics = metrics_of(state)
    spec = state.spec
    record = records.RunRecord(
        schema_version=records.SCHEMA_VERSION,
        run_id=state.run_id,
        spec=spec,
        spec_hash=spec.spec_hash(),
        metrics=metrics,
        efficiency=state.efficiency,
        environment=records.Environment(**environment(spec.device)),
        provenance=records.Provenance(
            **git_state(),
            weights_sha256=state.weights_sha256,
            dataset_fingerprint=state.fingerprint,
            command=state.options.command or shlex.join(["python", *sys.argv[:1]]),
            started=state.started,
            finished=finished,
            package_versions=package_versions(),
        ),
        status=status,  # type: ignore[arg-type]
        partial=status != "ok" or state.partial_reason is not None,
        demo=spec.demo,
        reason=reason,
        failures=_failures(state),
        constants=state.constants,
    )
    return record, store.write(record, state.options.results)


def _failures(state: State) -> tuple[records.ImageFailure, ...]:
    """The images that were skipped, in order."""
    failed = {} if state.shard is None else state.shard.failed
    return tuple(records.ImageFailure(name=name, reason=reason) for _, (name, reason) in sorted(failed.items()))
