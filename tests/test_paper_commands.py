"""The commands of a paper's table: they parse, their records are accepted by the row's own rule, a sweep runs them."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ovbench.cli import profile as profile_verb
from ovbench.cli import table as table_verb
from ovbench.cli import train as train_verb
from ovbench.cli.run import spec_of
from ovbench.errors import UsageError
from ovbench.evaluate.sweep.of_paper import Asked, jobs_of
from ovbench.models.backbone_constants import backbone_named
from ovbench.results.measured import Measured, flat, metric, of_record
from ovbench.results.panoptic_quality import panoptic_from_sums
from ovbench.tables import published
from ovbench.tables.commands import DATA, Command, arch_name, line, script, table_commands
from ovbench.tables.match import judge, protocol_for
from ovbench.tables.paper import printed_rows

TABLES = [(paper, table) for paper in published.papers() for table in published.tables(paper)]
_COMMANDS = [(pair, command) for pair in TABLES for row in table_commands(*pair) for command in row.commands]
RUNS = [(pair, command) for pair, command in _COMMANDS if command.verb == "run"]
PROFILES = [(pair, command) for pair, command in _COMMANDS if command.verb == "profile"]
TRAININGS = list(dict.fromkeys(command.training for _, command in RUNS if command.training is not None))
_PANOPTIC = panoptic_from_sums(["thing"], {0}, [0.5], [1], [0], [0])


@cache
def _parser(verb: Any, name: str) -> Any:
    app = typer.Typer()
    app.command(name)(verb)
    return typer.main.get_command(app)


def _parsed(verb: Any, name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The options that the real parser reads; an unknown one is an error."""
    return dict(_parser(verb, name).make_context(name, list(words)).params)


def test_every_number_of_ours_has_a_command_or_a_reason() -> None:
    for pair in TABLES:
        for row in table_commands(*pair):
            covered = {entry for command in row.commands for entry in command.entries}
            numbers = [entry for entry in printed_rows(published.table_numbers(*pair))[row.key].values()]
            left = [entry for entry in numbers if entry not in covered and not published.is_mean(entry.dataset)]
            assert bool(left) == bool(row.reasons), row
            for entry in left:  # each of its own reason, in words that name it where others of the row can run
                name = f"{entry.dataset} {metric(entry.metric, published.wanted(entry).classes).label}"
                assert not covered or any(name in why for why in row.reasons), (entry, row.reasons)


def _class(method: str) -> Any:
    from ovbench.registry import closed_set_class, method_class, method_info

    return closed_set_class(method) if method_info(method).track == "closed-set" else method_class(method)


def _foretold(command: Command) -> dict[str, Any]:
    """What the record of a run will say of method, options, network and protocol."""
    from ovbench.evaluate.expected import _options
    from ovbench.registry import method_info

    spec = spec_of(command.arguments("trained.safetensors")[1:])
    cls, training = _class(spec.method), command.training
    given = dict(spec.method_options)
    if training is not None:
        given = {**dict(training.options), **given}
    if method_info(spec.method).track == "closed-set":
        options = asdict(cls.configure(given))
        arch = spec.arch or (training and training.arch) or cls.DEFAULT_ARCH
    else:
        arch = spec.arch or (training and training.arch) or "ViT-B-16"
        options = _options(cls, cls.configure_for(given, weights=spec.weights, demo=False), backbone_named(arch))
    if training is not None:
        options |= {"trained_on": training.dataset, "training_overrides": list(training.overrides)}
    return {**spec.model_dump(mode="json"), "arch": arch, "method_options": json.loads(json.dumps(options))}


@pytest.mark.parametrize(("paper", "table"), [pair for pair in TABLES if pair in {pair for pair, _ in RUNS}])
def test_the_records_of_runs_are_accepted_by_their_rows(paper: str, table: str, make_record: Any) -> None:
    from ovbench.results.record import metrics_from_areas

    for command in [command for pair, command in RUNS if pair == (paper, table)]:
        spec = _foretold(command)
        wants = {entry: published.wanted(entry) for entry in command.entries}
        classes = [name for want in wants.values() for name in want.classes]
        classes += [entry.metric.removeprefix("iou:") for entry in wants]
        names = list(dict.fromkeys(classes))
        areas = ([5] * len(names), [15] * len(names), [10] * len(names), [10] * len(names))
        record = make_record(
            method=spec.pop("method"), dataset=spec.pop("dataset"), spec=spec,
            metrics=metrics_from_areas(names, *areas, images=3, panoptic=_PANOPTIC),
        )  # fmt: skip
        measured = of_record(record)
        for entry, want in wants.items():
            verdict = judge(measured, want, entry.unit, protocol_for(want.method, None))
            assert verdict.reasons == (), (line(command.arguments()), entry, verdict.reasons)


@pytest.mark.parametrize(("paper", "table"), [pair for pair in TABLES if pair in {pair for pair, _ in PROFILES}])
def test_the_profiles_of_commands_are_accepted_by_their_rows(
    paper: str, table: str, make_record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovbench.measure.profile import launch

    class Seen(Exception):
        pass

    seen: list[Any] = []

    def measure(spec: Any, **_: Any) -> Any:
        seen.append(spec)
        raise Seen

    monkeypatch.setattr(launch, "profile", measure)
    for command in [command for pair, command in PROFILES if pair == (paper, table)]:
        with pytest.raises(Seen):
            profile_verb.profile(**_parsed(profile_verb.profile, "profile", command.arguments()[1:]))
        spec = seen.pop()
        stages = {e.metric.removeprefix("latency:") for e in command.entries if e.metric.startswith("latency:")}
        cost = make_record().efficiency
        cost = cost.model_copy(update={"stages_ms": dict.fromkeys(stages, cost.latency_ms)})
        measured = Measured(
            id="p", origin="profile", finished=datetime(2026, 1, 1, tzinfo=timezone.utc), method=spec.method,
            arch=spec.arch, weights=spec.weights, dataset=spec.dataset, environment=make_record().environment,
            efficiency=cost, options=spec.method_options, fields=flat(spec.model_dump(mode="json")), image_gmacs=1.0,
        )  # fmt: skip
        assert command.entries
        for entry in command.entries:
            verdict = judge(measured, published.wanted(entry), entry.unit, None)
            assert verdict.reasons == (), (line(command.arguments()), entry, verdict.reasons)
            assert not spec.params_only or entry.metric == "params"


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.file)
def test_a_training_can_be_asked_for(training: Any) -> None:
    from ovbench import benchmarks
    from ovbench.train.recipe import recipe

    given = _parsed(train_verb.train, "train", training.arguments()[1:])
    assert (given["method"], given["dataset"], given["arch"]) == (training.method, training.dataset, training.arch)
    cls = _class(training.method)
    changes = dict(pair.split("=", 1) for pair in training.overrides)
    _, moved = recipe(cls.RECIPES, training.dataset, None, changes)
    assert sorted(moved) == sorted(changes)
    cls.configure(dict(training.options))  # an unknown option or value is an error
    benchmarks.get(training.dataset).for_split("train")


def test_trained_methods_and_networks_are_what_there_is() -> None:
    import open_clip

    from ovbench.networks.encoders import encoder_names
    from ovbench.registry import CLOSED_SET, method_names

    others = {name for name in method_names(None) if name not in method_names(CLOSED_SET)}
    assert set(published.trained_methods()) == {name for name in others if getattr(_class(name), "RECIPES", {})}
    known = {*encoder_names(), *open_clip.list_models()}
    assert set(published.arch_names()) <= known
    plain = [published.plain_arch(name) for name in published.arch_names()]
    assert len(set(plain)) == len(plain)
    for _, command in _COMMANDS:
        wants = [published.wanted(entry) for entry in command.entries]
        assert all(not want.arch or arch_name(want) is not None for want in wants)


def test_the_script_says_what_it_needs_and_what_cannot_run(tmp_path: Path) -> None:
    text = script(table_commands("direct-seg", "1"), "direct-seg", tmp_path)
    lines = text.splitlines()
    assert (
        f'ovbench run --method sc-clip --dataset voc21 --arch=ViT-B-16 --pretrained=openai --data-root "{DATA}"'
        in lines
    )
    assert "#   cannot run: published only: a method that is not ours" in lines
    assert "#   weights: CLIP 'openai'; attention 'dino-b8'" in lines
    trained = script(table_commands("thesis-caa", "3.2"), "thesis-caa", tmp_path)
    assert "ovbench train --method caa-fcn --dataset ade20k" in trained and "--option affinity=false" in trained
    for row in text.splitlines():
        words = shlex.split(row, comments=True)
        assert not words or words[0] == "ovbench"
    assert line(("run", "--data-root", DATA)) == f'ovbench run --data-root "{DATA}"'


def test_profiles_of_one_row_are_one_command() -> None:
    (row,) = [row for row in table_commands("thesis-lsmseg", "5.8") if row.key.row == "CAT-Seg"]
    (command,) = row.commands
    assert {entry.metric for entry in command.entries} == {"params", "flops", "latency"}
    assert ("params-only", "true") not in command.settings and ("count", "fvcore") in command.settings


def test_table_prints_commands(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(table_verb.table)
    done = CliRunner().invoke(app, ["--paper", "fisa", "--table", "3f", "--commands"])
    assert done.exit_code == 0 and "out of scope" in done.output and "\novbench" not in done.output
    out = tmp_path / "made.sh"
    done = CliRunner().invoke(app, ["--paper", "naclip-repo", "--commands", "--out", str(out)])
    assert done.exit_code == 0 and "--pamr=10" in out.read_text()
    done = CliRunner().invoke(app, ["--commands"])
    assert isinstance(done.exception, UsageError) and "--commands belongs to --paper" in str(done.exception)
    done = CliRunner().invoke(app, ["--paper", "direct-seg", "--commands"])
    assert isinstance(done.exception, UsageError) and "Which table of direct-seg?" in str(done.exception)


# --- sweep --------------------------------------------------------------------------------------------------------------


def _jobs(asked: Asked, root: Path, **how: Any) -> list[Any]:
    places = {"results": root / "runs", "profiles": root / "profiles", "trainings": root / "trainings"}
    return jobs_of(asked, spec_of, **places, device="cpu", **how)


def test_a_sweep_skips_what_cannot_run_and_says_why(tmp_path: Path) -> None:
    jobs = _jobs(Asked("direct-seg", "complexity"), tmp_path)
    assert [job.index for job in jobs] == list(range(len(jobs)))
    skipped = {job.method: job.skipped for job in jobs if job.skipped}
    assert "not built" in skipped["CASS, ViT-B/16"] or "CASS, ViT-B/16" not in skipped
    assert any("give --data-root" in (job.skipped or "") for job in jobs)
    profiles = [job for job in jobs if job.arguments[:1] == ("profile",)]
    assert profiles and all(job.skipped is None and job.problem is None for job in profiles)
    trained = _jobs(Asked("thesis-caa", "3.2", data_root=tmp_path), tmp_path)
    assert trained and all("no weights trained on ade20k" in (job.skipped or "") for job in trained)
    assert "ovbench train --method fcn" in (trained[0].skipped or "")
    with pytest.raises(UsageError, match="Which table of fisa"):
        _jobs(Asked("fisa"), tmp_path)


def test_a_sweep_takes_stored_profiles_as_recorded(tmp_path: Path) -> None:
    jobs = jobs_of(
        Asked("thesis-caa", "3.5", methods=("psp", "caa-psp")), spec_of, results=tmp_path, device="cpu",
        profiles=published.published_dir().parent / "profiles", trainings=tmp_path,
    )  # fmt: skip
    heads = [job for job in jobs if job.arguments[:1] == ("profile",) or job.recorded]
    assert {job.method for job in jobs} == {"psp", "caa-psp"}
    assert len(heads) == 2 and all(job.recorded for job in heads)


def test_a_demo_sweep_plans_runs_of_the_tables_rows(tmp_path: Path) -> None:
    jobs = _jobs(Asked("direct-seg", "1", methods=("clip",), datasets=("voc21",), demo=True), tmp_path)
    assert [(job.method, job.dataset, job.skipped, job.problem) for job in jobs] == [("clip", "voc21", None, None)]
    assert all("--demo" in job.arguments and "--pretrained=openai" not in job.arguments for job in jobs)
    changed = Asked("direct-seg", "1", methods=("clip",), datasets=("voc21",), demo=True, set={"dtype": "bfloat16"})
    assert all("--dtype=bfloat16" in job.arguments for job in _jobs(changed, tmp_path))


def test_metrics_without_a_figure_are_told_apart() -> None:
    assert metric("mIoU").measured and metric("iou:bed").measured
    assert not any(metric(name).measured for name in ("train_time", "referring", "ratio:bed", "mAP"))


def test_trained_weights_are_found_by_what_they_are_of(tmp_path: Path, make_record: Any) -> None:
    from ovbench.train.recipe import recipe
    from ovbench.train.record import PartReport, TrainRecord, TrainSpec, write

    rows = {row.key.row: row for row in table_commands("thesis-lsmseg", "5.10")}
    frozen, own = (rows[name].commands[0].training for name in ("Freeze", "CLIP _qv"))
    assert frozen is not None and own is not None and frozen.overrides == ("policy=frozen-clip",)
    cls = _class("lsmseg")
    options = json.loads(json.dumps(asdict(cls.configure({}))))
    environment = make_record().environment

    def store(name: str, *, set_: dict[str, str] | None = None, day: int = 1, **fields: Any) -> Path:
        chosen, moved = recipe(cls.RECIPES, "coco_stuff", None, set_)
        spec = {
            "method": "lsmseg", "method_options": options, "arch": "ViT-B-16", "weights": "openai", "dataset": "coco_stuff",
            "dataset_version": 1, "dataset_fingerprint": "0", "images": 9, "recipe": chosen, "overrides": moved,
            "planned": 9, "templates": "lsmseg", **fields.pop("spec", {}),
        }  # fmt: skip
        started = datetime(2026, 1, day, tzinfo=timezone.utc)
        record = TrainRecord(
            train_id=name, spec=TrainSpec(**spec), spec_hash="0", status=fields.get("status", "ok"), iterations=9,
            parts=(PartReport(part="all", params=1, trainable=1, lr_mult=1.0),), environment=environment, git_commit=None,
            git_dirty=None, package_versions={}, command="", started=started, reason=fields.get("reason"),
        )  # fmt: skip
        return write(record, tmp_path / name).with_name("model.safetensors")

    assert own.find(tmp_path) is None
    older = store("older")
    assert own.find(tmp_path) == older and frozen.find(tmp_path) is None
    newer = store("newer", day=2)
    kept = store("kept", set_={"policy": "frozen-clip"}, day=3)
    store("trial", day=4, spec={"limit_iters": 3})
    store("demo", day=5, spec={"demo": True})
    store("broken", day=6, status="failed", reason="no memory")
    store("other", day=7, spec={"method_options": {**options, "filter_k": 16}})
    store("large", day=8, spec={"arch": "ViT-L-14"})
    store("faster", day=9, set_={"lr": "0.5"})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "training.json").write_text("{")
    assert own.find(tmp_path) == newer and frozen.find(tmp_path) == kept
