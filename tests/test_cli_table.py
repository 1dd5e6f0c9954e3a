"""``ovbench table`` and ``ovbench compare`` as a user meets them: output, files, bytes, and the message for wrong input."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from ovbench.cli import compare as compare_verb
from ovbench.cli.app import run_command
from ovbench.results import image_areas, store
from ovbench.results.record import metrics_from_areas

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def runs(make_record: Callable[..., Any], tmp_path: Path) -> Path:
    """A folder of records that may, and some that may not, stand in a paper's table."""
    root = tmp_path / "results" / "runs"
    for method in ("clip", "sc-clip", "naclip"):
        for dataset in ("voc21", "ade20k", "voc20"):
            store.write(make_record(method=method, dataset=dataset, spec={"arch": "ViT-B-16-quickgelu"}), root)
    store.write(make_record(spec={"arch": "ViT-B-16", "protocol": "common"}), root)
    store.write(make_record(spec={"weights": "builtin", "demo": True}), root)
    store.write(make_record(spec={"weights": "caf\u00e9.pt"}, environment_fields={"cpu": "CPU two"}), root)
    return root


PAPER = ("table", "--paper", "direct-seg", "--table", "1", "--explain")


FORMATS = ("rich", "markdown", "csv", "json", "latex", "html")
SURROUNDINGS = (
    {"PYTHONHASHSEED": "0", "LC_ALL": "C", "COLUMNS": "60"},
    {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TERM": "dumb", "FORCE_COLOR": "1"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "de_DE.ISO-8859-1", "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
)


def test_bytes_depend_on_the_records_alone(runs: Path, tmp_path: Path) -> None:
    tables = (PAPER, ("table", "--columns", "miou,latency"))
    code = (
        "import sys; from ovbench.cli.app import run_command\n"
        f"for index, arguments in enumerate({tables!r}):\n"
        f"    for format in {FORMATS!r}:\n"
        f"        options = ['--results', {str(runs)!r}, '--format', format, '--out', f'{{sys.argv[1]}}/{{index}}.{{format}}']\n"
        "        assert run_command([*arguments, *options]) == 0"
    )
    found: dict[str, set[str]] = {}
    for number, surroundings in enumerate(SURROUNDINGS):
        env = {**os.environ, **surroundings}
        folder = tmp_path / str(number)
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, env=env, timeout=300, check=True)
        for path in folder.iterdir():
            found.setdefault(path.name, set()).add(hashlib.sha256(path.read_bytes()).hexdigest())
        format = FORMATS[number]  # what goes to a pipe is what goes to a file
        command = [sys.executable, "-m", "ovbench", *PAPER, "--results", str(runs), "--format", format]
        piped = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=300, check=True).stdout
        assert piped == (folder / f"0.{format}").read_bytes() and len(piped.decode("utf-8")) > 1000
    assert len(found) == len(FORMATS) * len(tables)
    assert {name: len(hashes) for name, hashes in found.items()} == dict.fromkeys(found, 1)


def test_tables_load_no_torch(runs: Path, run_python: Cli, tmp_path: Path) -> None:
    tables = (PAPER, ("table",), ("table", "--paper", "thesis-caa", "--table", "3.5", "-f", "html"))
    code = (
        "import sys; from ovbench.cli.app import run_command\n"
        "heavy = {'torch', 'open_clip', 'pandas', 'matplotlib', 'mmseg', 'mmengine', 'mmcv', 'cv2'}\n"
        f"for arguments in {tables!r}:\n"
        f"    status = run_command([*arguments, '--results', {str(runs)!r}])\n"
        "    print('AFTER', arguments, sorted(heavy & set(sys.modules)), status, file=sys.stderr)"
    )
    done = run_python("-c", code, cwd=tmp_path)
    told = [line for line in done.stderr.splitlines() if line.startswith("AFTER ")]
    assert told == [f"AFTER {arguments} [] 0" for arguments in tables], done.stderr


def test_a_papers_table_with_what_was_refused(runs: Path, run_cli: Cli) -> None:
    done = run_cli(*PAPER, "--results", str(runs), "-f", "markdown")
    assert done.returncode == 0, done.stderr
    assert "| SC-CLIP |  | ViT-B/16 | sc-clip |  | 37.78 | 64.6 | −26.82 |" in done.stdout
    assert "protocol is common, not sc-clip" in done.stdout and "it is a demo" in done.stdout


def test_tables_of_a_paper_are_listed(run_cli: Cli) -> None:
    done = run_cli("table", "--paper", "fisa")
    assert done.returncode == 0 and "3a" in done.stdout and "throughput" in done.stdout
    done = run_cli("table", "--paper", "scn")
    assert done.returncode == 0 and "rather than guessed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--paper", "direct"), "Unknown paper 'direct'. Did you mean: direct-seg"),
        (("--paper", "fisa", "--table", "9"), "Unknown table of fisa '9'"),
        (("--table", "1"), "--table belongs to --paper"),
        (("--protocol", "common"), "--protocol belongs to --paper"),
        (("--paper", "fisa", "--table", "1", "--methods", "clip"), "--methods does not go with --paper"),
        (("--paper", "fisa", "--table", "1", "--protocol", "comon"), "Unknown protocol 'comon'. Did you mean: common"),
        (("--format", "tex"), "Unknown format 'tex'"),
        (("--methods", "nclip"), "Unknown method 'nclip'. Did you mean: naclip"),
    ],
)
def test_wrong_options_name_the_fix(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    assert run_command(["table", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_cannot_be_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(["table", "--results", str(runs), "--out", str(tmp_path / "file" / "t.md")]) == 5
    assert "Choose another place with --out" in capsys.readouterr().err


# --- compare ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(make_record: Callable[..., Any], tmp_path: Path) -> tuple[Path, list[str]]:
    """Two runs with their areas per image."""
    root, ids = tmp_path / "results" / "runs", []
    random = np.random.default_rng(0)
    label = random.integers(1, 60, (20, 30))
    for method, share in (("clip", 0.3), ("sc-clip", 0.5)):
        inter = np.floor(label * np.minimum(1, share * random.random(label.shape) * 2)).astype(int)
        pred = inter + random.integers(0, 30, label.shape)
        sums = [array.sum(axis=0) for array in (inter, pred + label - inter, pred, label)]
        names = [f"class {k}" for k in range(30)]
        record = make_record(method=method, metrics=metrics_from_areas(names, *sums, images=20))
        path = store.write(record, root)
        lines: list[dict[str, Any]] = [
            {"version": 1, "dataset_fingerprint": record.provenance.dataset_fingerprint, "run_id": record.run_id}
        ]
        for index in range(20):
            areas = {"intersect": inter[index].tolist(), "pred": pred[index].tolist(), "label": label[index].tolist()}
            lines.append({"index": index, "name": f"{index}.png", "classes": list(range(30)), **areas})
        image_areas.path_beside(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
        ids.append(record.run_id)
    return root, ids


def _compare(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(compare_verb.compare)
    return CliRunner().invoke(app, list(arguments))


def test_compare_prints_what_a_reader_needs(pair: tuple[Path, list[str]]) -> None:
    root, ids = pair
    done = _compare(*ids, "--results", str(root), "--resamples", "300", "--show-classes", "3")
    assert done.exit_code == 0, done.output
    for words in (
        "95 % interval [+",
        "paired bootstrap over 20 images",
        "24 more",
        "settings that differ: method clip / sc-clip",
    ):
        assert words in done.output, done.output
    assert "different protocols" in done.output  # each under its own preset
    shown = _compare(*ids, "--results", str(root), "--resamples", "300", "--show-classes", "0").output
    assert all(f"class {k} " in shown for k in range(30))


def test_compare_json_is_unrounded_and_repeatable(pair: tuple[Path, list[str]]) -> None:
    root, ids = pair
    arguments = (ids[0], ids[1], ids[0], "--results", str(root), "--resamples", "300", "--seed", "3", "--json")
    done = [_compare(*arguments) for _ in range(2)]
    assert done[0].stdout == done[1].stdout
    better, same = json.loads(done[0].stdout)["comparisons"]
    assert better["interval"]["seed"] == 3 and better["interval"]["low"] > 0 and better["interval"]["above_zero"] == 1
    assert (same["interval"]["low"], same["interval"]["high"], same["difference"]) == (0, 0, 0)


def test_compare_draws_a_plot_of_named_and_of_all_runs(pair: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, ids = pair
    done = _compare(
        *ids, "--results", str(root), "--pareto", "gmacs", "--plot", str(tmp_path / "a.svg"), "--resamples", "9"
    )
    assert done.exit_code == 0 and (tmp_path / "a.svg").read_text().startswith("<?xml")
    done = _compare("--results", str(root), "--dataset", "voc21", "--plot", str(tmp_path / "b.png"))
    assert done.exit_code == 0 and "Plot of 2 runs" in done.output and (tmp_path / "b.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Name at least two runs"),
        (("one",), "Name at least two runs"),
        (("--pareto", "latency"), "--pareto belongs to a plot"),
        (("none", "nil"), "No run 'none'"),
        (("--plot", "x.png", "--dataset", "voc99"), "Unknown dataset 'voc99'"),
    ],
)
def test_compare_names_the_fix(pair: tuple[Path, list[str]], arguments: tuple[str, ...], words: str) -> None:
    done = _compare(*arguments, "--results", str(pair[0]))
    assert done.exit_code != 0 and words in str(done.exception)
