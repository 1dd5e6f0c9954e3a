"""The command ``ovbench``: its verbs, and how every failure becomes one line and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ovbench import __version__
from ovbench.cli.compare import compare
from ovbench.cli.console import fail, say
from ovbench.cli.data import app as data_app
from ovbench.cli.env import env
from ovbench.cli.known import Verb, moved
from ovbench.cli.list import list_names
from ovbench.cli.predict import predict
from ovbench.cli.profile import profile
from ovbench.cli.prompts import app as prompts_app
from ovbench.cli.report import report
from ovbench.cli.run import run
from ovbench.cli.schema import schema
from ovbench.cli.sweep import sweep
from ovbench.cli.table import table
from ovbench.cli.train import train
from ovbench.cli.verify import verify
from ovbench.errors import OvbenchError, OvbenchWarning
from ovbench.paths import TRUST

EPILOG = (
    "Exit codes: 0 done; 1 a fault in ovbench itself (please report it); 2 a wrong option, name or combination; "
    "3 data missing or broken; 4 weights missing, not to be downloaded, or unfit; 5 the run failed on the way; "
    "6 'verify' found areas that differ; "
    "130 interrupted.\n\nData goes to stdout, messages to stderr."
)

app = typer.Typer(
    name="ovbench",
    epilog=EPILOG,
    rich_markup_mode="rich",
    # A fault in ovbench shows Python's own traceback, which can be pasted into a report.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"ovbench {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def ovbench(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="Configs that you were given may name places outside their folder (OVBENCH_TRUST=1)."
        ),
    ] = False,
) -> None:
    """Benchmarks open-vocabulary semantic segmentation: accuracy, cost and provenance in one record.

    \b
    Examples:
    ovbench run --demo --method sc-clip --dataset voc21   (downloads nothing)
    ovbench run --method sc-clip --dataset voc21 --data-root ~/data/VOCdevkit
    ovbench predict street.jpg --classes "road, car, sky" --overlay out.png
    ovbench table
    """
    if trust:
        os.environ[TRUST] = "1"  # processes that are started inherit it
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


app.command("run", cls=Verb)(run)
app.command("predict", cls=Verb)(predict)
app.command("sweep", cls=Verb)(sweep)
app.command("train", cls=Verb)(train)
app.command("list", cls=Verb)(list_names)
app.command("table", cls=Verb)(table)
app.command("compare", cls=Verb)(compare)
app.command("profile", cls=Verb)(profile)
app.command("report", cls=Verb)(report)
app.command("verify", cls=Verb)(verify)
app.add_typer(data_app, name="data", help="Fetch, prepare, make and check copies of the benchmarks.")
app.add_typer(prompts_app, name="prompts", help="Show, check or generate descriptions of classes.")
app.command("env", cls=Verb)(env)
app.command("schema", cls=Verb)(schema)


def run_command(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status of the process; prints failures that a user can mend."""
    with warnings.catch_warnings():
        _say_warnings()
        return _run_command(argv)


def _say_warnings() -> None:
    """Prints ovbench's own warnings as one line; those of libraries as Python does."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, OvbenchWarning):
            say(f"Warning: {message}")
        else:
            usual(message, category, *where)

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.simplefilter("always", OvbenchWarning)


def _run_command(argv: Sequence[str] | None) -> int:
    try:
        command = typer.main.get_command(app)
        result = command.main(args=None if argv is None else list(argv), prog_name="ovbench", standalone_mode=False)
        sys.stdout.flush()
    except OvbenchError as error:
        fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        fail("interrupted.")
        return 130
    except typer.Abort:
        fail("aborted.")
        return 1
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Typer's own usage errors come from a bundled copy of click whose classes have no public name.
        message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
        if not callable(message) or not isinstance(code, int):
            raise
        text = _one_line(str(message()))
        if not text:  # help was asked for by giving no arguments, and is printed already
            return code
        context = getattr(error, "ctx", None)
        known = None if context is None else moved(context.command_path, str(getattr(error, "option_name", "")))
        fail(known or text)
        if context is not None:
            say(f"Try '{context.command_path} --help'.")
        return code
    return result if isinstance(result, int) else 0


def _one_line(message: str) -> str:
    message = " ".join(message.split())
    return message if not message or message.endswith((".", "?", "!", ")")) else message + "."
