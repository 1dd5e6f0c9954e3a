"""One run from a spec to a record: data found and checked, model built, images evaluated, figures measured, all stored.

Whatever ends a run early leaves a record that says so, and a shard file from which ``resume`` continues.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from ovbench.errors import Interrupted, RunError, UsageError
from ovbench.evaluate import ranks
from ovbench.evaluate.faults import clear_error
from ovbench.evaluate.signals import held_back
from ovbench.paths import user_path
from ovbench.results import record as records
from ovbench.results import store
from ovbench.results.panoptic_quality import panoptic_from_sums
from ovbench.spec import RunSpec, validated

RECORDED = "Recorded already: "  # begins the message of a run that skip_recorded has ended


@dataclass(frozen=True)
class RunOptions:
    """Where things lie and how they are worked through; nothing here can move a score.

    Attributes:
        data_root: Folder of the dataset (found in customary layouts); None only for demo runs.
        results: Root folder of the records.
        batch: Images per step; None takes 1 on a CPU and 8 on a GPU, where small batches leave it idle.
        workers: Processes that read and resize images; None chooses.
        resume: Continue the newest unfinished run of the same spec and data.
        skip_recorded: Return the newest whole record of the same spec and data where there is one.
        on_error: What an image that cannot be read does: ``stop`` the run with its name, or ``skip`` it, which marks the
            run partial.
        launcher: What has started this process and others that share the images: ``none``, ``pytorch`` or ``slurm``.
        save_predictions: Write a palette PNG per image.
        gallery: Images in the overlay gallery, 0 for none.
        check: Look at the first label files before anything else.
        cache_masks: Keep the proposals of a mask generator on disk, in a folder of at most so many GiB; 0 = off.
        command: Command line for the record.
        on_images: Progress callback (finished, total).
        on_message: Receives notices for the user.
    """

    data_root: Path | None = None
    results: Path = store.DEFAULT_ROOT
    batch: int | None = None
    workers: int | None = None
    resume: bool = False
    skip_recorded: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    launcher: str = "none"
    save_predictions: bool = False
    gallery: int = 4
    check: bool = True
    cache_masks: float = 0.0
    command: str | None = None
    on_images: Callable[[int, int], None] = lambda done, total: None
    on_message: Callable[[str], None] = lambda text: None


@dataclass
class _State:
    """What is known of a run so far, for the record of a run that ends early."""

    spec: RunSpec
    options: RunOptions
    started: datetime
    run_id: str = ""
    fingerprint: str | None = None
    weights_sha256: str | None = None
    metrics: records.Metrics | None = None
    efficiency: records.Efficiency | None = None
    shard: Any = None
    partial_reason: str | None = None
    benchmark: Any = None
    recorded: records.RunRecord | None = None
    team: ranks.Team = field(default_factory=ranks.Team)


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
    state = _State(checked, chosen, datetime.now(timezone.utc), team=team)
    state.run_id = records.new_run_id(checked.spec_hash(), state.started)
    try:
        return _run(state)
    finally:
        if state.shard is not None:
            state.shard.close()
        team.leave()


def _run(state: _State) -> records.RunRecord:
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


def _ended(state: _State, error: BaseException, status: str, reason: str) -> str:
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


def _evaluate(state: _State) -> None:
    from ovbench import benchmarks
    from ovbench.evaluate.inputs import data_of
    from ovbench.registry import CLOSED_SET, method_info

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
        build = _closed_set_model if method_info(spec.method).track == CLOSED_SET else _open_vocab_model
        model, known = build(spec, benchmark, state)
    weights = Path(spec.weights).name if user_path(spec.weights).is_file() else spec.weights
    state.weights_sha256 = known["weights_sha256"]
    demo = known.pop("demo", False) or spec.demo or synthetic or spec.weights == "builtin"
    common = {"dataset": benchmark.name, "dataset_version": benchmark.version, "weights": weights, "demo": demo}
    state.spec = spec.model_copy(update={**common, **known})
    if options.skip_recorded and _is_recorded(state):
        return
    options.on_message(
        f"{state.spec.method} on {spec.dataset}: {state.spec.arch}, {spec.weights}, {spec.protocol.name} protocol"
        + (f", {state.team.world} processes" if state.team.world > 1 else "")
    )

    from ovbench.evaluate.session import evaluate_images

    evaluate_images(state, benchmark, root, model, synthetic=synthetic)


def _is_recorded(state: _State) -> bool:
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


def _open_vocab_model(spec: RunSpec, benchmark: Any, state: _State) -> tuple[Any, dict[str, Any]]:
    """The model of a spec and what building it has found out for the record."""
    from ovbench.evaluate.inputs import wording_of, words_of

    wording = wording_of(benchmark, spec)
    words, wording_hash = words_of(benchmark, spec)

    from ovbench.models.patch_model import require_device
    from ovbench.models.trained_file import options_again, read_about, require_method, told
    from ovbench.registry import method_class, method_info
    from ovbench.words.embeddings import prompts

    require_device(spec.device)
    cls = method_class(spec.method)
    path = user_path(spec.weights)
    about = read_about(path) if path.is_file() else None
    given = spec.method_options
    if about is not None:
        require_method(about, method_info(spec.method).name)
        given = {**options_again(about.method_options, cls), **given}
    config = cls.configure_for(given, weights=spec.weights, demo=spec.demo)
    query_words = [word for entry in words for word in entry]
    prompts_hash = prompts(spec.protocol.templates).sha256(query_words)
    method = cls.load(spec.weights, spec.arch, config, activation=spec.activation, seed=spec.seed, device=spec.device)
    if state.options.cache_masks > 0:
        method.cache_proposals(int(state.options.cache_masks * 2**30))
    clip = method.clip
    protocol = spec.protocol.model_copy(
        update={"wording": wording, "wording_sha256": wording_hash, "templates_sha256": prompts_hash}
    )
    info = method_info(spec.method)  # after the class: a file of the user's own may have been edited meanwhile
    model = cls.model_class()(
        method,
        words,
        protocol,
        dtype=spec.dtype,
        window_batch=spec.window_batch,
        compile_mode=spec.compile_mode,
        background=benchmark.background,
    )
    _note_trial(state, about)
    if protocol.has_thresholds and benchmark.background:
        name = benchmark.class_names[benchmark.background]
        state.options.on_message(f"Thresholds leave pixels to the background, class {benchmark.background} ({name}).")
    if getattr(model, "needs_truth", False):
        reasons = state.partial_reason, "an oracle has looked at the labels: an upper bound, no result"
        state.partial_reason = "; ".join(filter(None, reasons))
    return model, {
        "demo": about is not None and about.demo,
        "protocol": protocol,
        "method": info.name,
        "method_options": {**method.options(), **info.recorded(), **told(about)},
        "arch": clip.arch,
        "activation": clip.activation,
        "weights_sha256": clip.weights_sha256,
    }


def _closed_set_model(spec: RunSpec, benchmark: Any, state: _State) -> tuple[Any, dict[str, Any]]:
    """As :func:`_open_vocab_model`, of a network whose classes are those it was trained on."""
    from ovbench.models.closed_set_weights import build_closed_set_model
    from ovbench.models.trained_file import told
    from ovbench.registry import method_info

    model, loaded = build_closed_set_model(
        spec.method,
        classes=benchmark.class_names,
        weights=spec.weights,
        arch=spec.arch,
        protocol=spec.protocol,
        dtype=spec.dtype,
        device=spec.device,
        window_batch=spec.window_batch,
        compile_mode=spec.compile_mode,
        seed=spec.seed,
        method_options=spec.method_options,
    )
    about = loaded.about
    _note_trial(state, about)
    info = method_info(spec.method)
    return model, {
        "method": info.name,
        "method_options": {**loaded.method.options(), **info.recorded(), **told(about)},
        "arch": loaded.arch,
        "weights_sha256": loaded.weights_sha256,
        "demo": about is not None and about.demo,
    }


def _note_trial(state: _State, about: Any) -> None:
    """Marks a run partial whose weights were not trained to the end."""
    if about is not None and about.iterations < about.planned:
        state.partial_reason = f"weights of a trial: {about.iterations} of {about.planned} iterations were trained"


def _store(state: _State, status: str, reason: str | None) -> tuple[records.RunRecord, Path]:
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
    )
    return record, store.write(record, state.options.results)


def _failures(state: _State) -> tuple[records.ImageFailure, ...]:
    """The images that were skipped, in order."""
    failed = {} if state.shard is None else state.shard.failed
    return tuple(records.ImageFailure(name=name, reason=reason) for _, (name, reason) in sorted(failed.items()))


def metrics_of(state: _State) -> records.Metrics:
    """Scores from what the run's shard file holds per image."""
    benchmark, total = state.benchmark, state.shard.total()
    panoptic, reason = None, None
    if benchmark.panoptic is not None:
        sums = state.shard.total_quality()
        if sums is None:
            reason = f"{state.spec.method} gives labels per pixel, no segments"
        else:
            parts = (part.tolist() for part in sums)
            panoptic = panoptic_from_sums(benchmark.class_names, benchmark.panoptic.things, *parts)
    return records.metrics_from_areas(
        benchmark.class_names,
        total.intersect.tolist(),
        total.union.tolist(),
        total.pred.tolist(),
        total.label.tolist(),
        images=len(state.shard.done),
        panoptic=panoptic,
        panoptic_reason=reason,
    )


def default_batch(device: str) -> int:
    """Images per step: a GPU needs several to be busy."""
    return 1 if device == "cpu" else 8


def default_workers(device: str) -> int:
    """Reader processes: one beside a CPU that computes, up to 8 beside a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cpu" and cores > 1 else min(8, cores - 1) if device != "cpu" else 0
