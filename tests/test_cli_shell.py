"""The command line around the verbs: help, versions, wrong verbs and options, listings, schema."""

from __future__ import annotations

import json

import pytest

from ovbench import __version__
from ovbench.cli.app import run_command


def out_of(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    assert run_command(arguments) == code
    return capsys.readouterr()


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of(["--version"], capsys)[0].strip() == f"ovbench {__version__}"
    text = out_of(["--help"], capsys)[0]
    for word in ("Examples", "Exit codes", "run", "predict", "table", "schema", "data"):
        assert word in text


@pytest.mark.parametrize("verb", ["run", "predict", "list", "table", "env", "schema"])
def test_every_verb_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"ovbench {verb}" in out_of([verb, "--help"], capsys)[0].split("Options")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "run"),
        (["run", "--methd", "clip"], "--method"),
        (["run", "-m", "clip"], "--dataset"),
        (["list", "method"], "Unknown list 'method'. Did you mean: methods"),
        (["run", "-m", "clip", "-d", "voc21", "--batch", "0"], "--batch"),
    ],
)
def test_wrong_verbs_and_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = out_of(arguments, capsys, 2)
    assert out == "" and err.startswith("Error: ") and message in err


def test_listings_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(out_of(["list", "--json"], capsys)[0])
    assert set(found) == {"methods", "datasets", "protocols"}
    assert sum(item["group"] == "eight" for item in found["datasets"]) == 8
    assert {"name", "summary", "paper", "track", "protocol"} <= set(found["methods"][0])
    assert {"sclip", "naclip", "sc-clip", "proxyclip", "clearclip", "common"} <= {p["name"] for p in found["protocols"]}


def test_schema_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(out_of(["schema"], capsys)[0])
    assert {"spec", "metrics", "efficiency", "environment", "provenance"} <= set(schema["properties"])
    environment = json.loads(out_of(["env", "--json"], capsys)[0])
    assert environment["environment"]["torch"] and environment["package_versions"]["mmengine"]
