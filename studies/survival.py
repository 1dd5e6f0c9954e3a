"""Kills runs and shares them among processes, and compares the areas of every image with those of an undisturbed run.

    python studies/survival.py                      (50 kills, 1, 2, 3 and 5 processes, a dead process of three)
    python studies/survival.py --kills 10 --worlds 2,3

Every run is 'ovbench run --demo -m clip -d voc21' on small windows, in a process of its own: 24 generated images, the
built-in CLIP. Those that are killed are forked from a process that has imported everything, so that the moments do not all
lie in the imports. A killed run is resumed, and killed again, until it ends before its next kill; then the next one starts.
Half of the moments lie anywhere between the start of the process and its expected end, half follow a finished image at once
or a little later. SIGKILL goes to the process that evaluates, so its reader outlives it for a moment, as after a real kill.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovbench.results import image_areas, store
from study import comma, parser

RUN = ["run", "--demo", "-m", "clip", "-d", "voc21", "--device", "cpu", "--gallery", "2"]
RUN += ["--short-side", "112", "--crop", "112", "--stride", "112", "--window-batch", "2"]
IMAGES = 24


def start(results: Path, *more: str, launch: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    modules = ("-m", *launch, "-m", "ovbench") if launch else ("-m", "ovbench")
    command = [sys.executable, *modules, *RUN, "--results", str(results), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _command(argv: list[str], said: Path) -> None:
    from ovbench.cli.app import run_command

    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os._exit(run_command(argv))


def fork(results: Path, *more: str) -> tuple[Any, Path]:
    """The same in a process forked from one that has imported everything, and the file of what it says."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["ovbench.cli.app", "ovbench.evaluate.loop", "ovbench.mm.segmentor", "ovbench.evaluate.session"]
    )
    said = results.with_suffix(".txt")
    process = context.Process(target=_command, args=([*RUN, "--results", str(results), *more], said))
    process.start()
    return process, said


def finished(results: Path) -> int:
    """Images in all shards, whole lines only."""
    found: set[bytes] = set()
    for path in results.rglob("*.areas.jsonl"):
        found |= {line.split(b",")[0] for line in path.read_bytes().splitlines()[1:] if line.endswith(b"}")}
    return len(found)


def areas(results: Path) -> list[tuple[Any, ...]]:
    """Name and areas of every image of the one record in a folder."""
    [record] = store.load_all(results)
    if record.status != "ok":
        sys.exit(f"the run ended {record.status}: {record.reason}")
    found = image_areas.read(image_areas.path_beside(store.record_path(record, results)), record)
    tables = (found.intersect, found.pred, found.label)
    return [(name, *(table[row].tolist() for table in tables)) for row, name in enumerate(found.names)]


def compare(what: str, results: Path, expected: object) -> None:
    """Says that the areas are the expected ones, or ends with an error."""
    if areas(results) != expected:
        sys.exit(f"{what}: areas DIFFER, see {results}")
    left = [path.name for path in results.rglob("*") if ".rank" in path.name or path.suffix in (".tmp", ".part")]
    print(
        f"{what}: areas of {len(areas(results))} images identical" + (f"; left over: {left}" if left else ""),
        flush=True,
    )


def end(process: subprocess.Popen[str], what: str) -> None:
    """Waits for a run that must end well."""
    _, said = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{what} ended with {process.returncode}: {said[-800:]}")


def moment(process: Any, results: Path, seconds: float, chance: random.Random) -> str:
    """Waits until the moment of the next kill, or the end of the run; returns what was waited for."""
    if chance.random() < 0.5:
        limit = time.monotonic() + chance.uniform(0.0, seconds)
        while process.is_alive() and time.monotonic() < limit:
            time.sleep(0.005)
        return "anywhere"
    images = finished(results) + chance.randint(1, 4)
    while process.is_alive() and finished(results) < min(images, IMAGES):
        time.sleep(0.005)
    time.sleep(chance.choice((0.0, chance.uniform(0.0, 0.6))))
    return "after an image"


def kill_often(work: Path, kills: int, seconds: float, expected: object, chance: random.Random) -> None:
    """Kills runs until there were ``kills`` kills, and compares each when it has ended."""
    done, runs, tally, lost = 0, 0, Counter[str](), 0
    while done < kills:
        results, own, before = work / f"killed-{runs}", 0, 0
        while True:
            process, said = fork(results, "--resume")
            kind = moment(process, results, seconds, chance) if done < kills else "left alone"
            if done < kills:
                process.kill()
            process.join()
            if process.exitcode == 0:
                break
            if process.exitcode != -signal.SIGKILL:
                sys.exit(f"ended with {process.exitcode}: {said.read_text()[-800:]}")
            for path in results.rglob("*.json"):
                store.read(path)  # whole, or this raises
            after = finished(results) if results.exists() else 0
            lost += max(0, before - after)
            before, done, own = after, done + 1, own + 1
            tally["before the first image" if after == 0 else "between" if after < IMAGES else "after the last"] += 1
            print(f"  kill {done:2d} ({kind}): {after} images kept", flush=True)
        compare(f"run {runs} after {own} kills", results, expected)
        runs += 1
    print(f"{done} kills over {runs} runs ({dict(tally)}): {lost} finished images lost", flush=True)


def worlds(work: Path, counts: list[int], expected: object) -> None:
    """One run for each number of processes, by torchrun."""
    for count in counts:
        results = work / f"world-{count}"
        launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
        end(start(results, "--launcher", "pytorch", "--workers", "0", launch=launch), f"{count} processes")
        compare(f"{count} processes", results, expected)


def dead_process(work: Path, expected: object) -> None:
    """Kills one of three processes (started without torchrun, which would end the others); one process resumes."""
    results = work / "dead"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29653", "WORLD_SIZE": "3", "OVBENCH_PEER_TIMEOUT": "15"}
    group = []
    for rank in range(3):
        os.environ["RANK"] = str(rank)
        group.append(start(results, "--launcher", "pytorch", "--workers", "0"))
    while finished(results) < 6:
        time.sleep(0.05)
    group[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ends = [(process.communicate()[1].strip().splitlines()[-1:], process.returncode) for process in group]
    waited = time.monotonic() - killed
    print(
        f"1 of 3 processes killed after {finished(results)} images; the others ended {waited:.0f} s later:", flush=True
    )
    for rank, (said, code) in enumerate(ends):
        print(f"  process {rank}: {code}, {' '.join(said)[:160]}", flush=True)
    if [code for _, code in ends] != [5, -signal.SIGKILL, 5]:
        sys.exit("these are not the expected exit codes")
    end(start(results, "--resume"), "the resumed run")
    compare("resumed by one process", results, expected)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what was asked for."""
    cli = parser(__doc__)
    cli.add_argument("--kills", type=int, default=50)
    cli.add_argument("--worlds", type=comma(int), default=[1, 2, 3, 5], help="numbers of processes; empty for none")
    cli.add_argument("--no-dead", action="store_true", help="leave the dead process out")
    cli.add_argument("--seed", type=int, default=0)
    a = cli.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="ovbench-survival-") as folder:
        work = Path(folder)
        os.environ["OVBENCH_CACHE"] = str(work / "cache")
        end(start(work / "whole"), "the undisturbed run")
        expected = areas(work / "whole")
        worlds(work, a.worlds, expected)
        if not a.no_dead:
            dead_process(work, expected)
        for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
            os.environ.pop(name, None)
        if a.kills:
            fork(work / "first")[0].join()  # loads the imports
            begin = time.monotonic()
            fork(work / "again")[0].join()
            seconds = time.monotonic() - begin
            compare("an undisturbed run once more", work / "again", expected)
            kill_often(work, a.kills, seconds, expected, random.Random(a.seed))


if __name__ == "__main__":
    main()
