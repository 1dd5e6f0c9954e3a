"""What may go wrong in a run, one case each: how it ends, what it says, and that the resumed run is the uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import IMAGES, areas_of, outcome, spec
from tiny_clip import save_tiny
from torch.utils.data import get_worker_info

import ovbench
from ovbench import benchmarks
from ovbench.benchmarks.synth.copies import synth
from ovbench.cli.app import run_command
from ovbench.errors import Interrupted, OvbenchWarning, RunError
from ovbench.evaluate import shards
from ovbench.evaluate.loop import Images, batches
from ovbench.evaluate.shards import Shard
from ovbench.evaluate.signals import held_back
from ovbench.evaluate.verify import Given, verify
from ovbench.results import image_areas, store
from ovbench.results.record import RunRecord


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors", layers=2))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("voc21", tmp_path_factory.mktemp("voc"), images=IMAGES, size=(64, 96))


@pytest.fixture(scope="module")
def whole(weights: str, voc: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return ovbench.run(spec(weights), data_root=voc, results=tmp_path_factory.mktemp("whole"), workers=0, gallery=0)


@pytest.fixture(scope="module")
def stopped(weights: str, voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a run that was killed after 3 images: a shard, and no record."""
    results = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        ovbench.run(spec(weights), data_root=voc, results=results, workers=0, gallery=0, on_images=at(3, interrupt))
    store.record_path(store.load_all(results)[0], results).unlink()
    return results


def at(image: int, action: Callable[[], None]) -> Callable[[int, int], None]:
    """A progress callback that acts when so many images are finished."""
    return lambda done, total: action() if done == image else None


def interrupt() -> None:
    raise KeyboardInterrupt


def shard_in(results: Path) -> Path:
    [path] = results.rglob("*.areas.jsonl")
    return path


def resumed(weights: str, voc: Path, results: Path) -> tuple[RunRecord, list[str], int]:
    """The record of the resumed run, what it told, and how many images it found done."""
    messages: list[str] = []
    first: list[int] = []
    record = ovbench.run(
        spec(weights), data_root=voc, results=results, workers=0, gallery=0, resume=True,
        on_message=messages.append, on_images=lambda done, total: first.append(done),
    )  # fmt: skip
    path = store.record_path(record, results)
    assert image_areas.read(image_areas.path_beside(path), record).names == tuple(
        pair.image.name for pair in benchmarks.get("voc21").pairs(voc)
    )
    assert not list(results.rglob("*.tmp")) and not list(results.rglob("*.part"))
    return record, messages, first[0] if first else IMAGES


# ---- the file: what a kill or a disk may leave of it, and how many images of three are still good


def cut_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def half_line_more(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"index":3,"name":"cut by a ki')


def garbage_inside(path: Path) -> None:
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(rows[0] + rows[1] + b"\0\xff\xfe" * 50 + b"\n[1]\n{}\n" + rows[3])


def changed_digit(path: Path) -> None:
    rows = path.read_text().splitlines()
    entry = json.loads(rows[2])
    entry["pred"][0] += 1
    rows[2] = json.dumps(entry, separators=(",", ":"))
    path.write_text("\n".join(rows) + "\n")


def twice(path: Path) -> None:
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows, rows[2], rows[1]]))


def no_checksums(path: Path) -> None:
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "crc"}) + "\n" for row in rows))


def failed_before(path: Path) -> None:
    path.write_bytes(path.read_bytes() + shards.sealed({"index": 5, "name": "b", "error": "away for a moment"}))


def broken_record(path: Path) -> None:
    path.with_name(path.name.removesuffix(shards.SUFFIX) + ".json").write_text('{"status": "o')


def left_by_others(path: Path) -> None:
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(rows[0] + rows[1])
    shards.rank_path(path, 1).write_bytes(rows[0] + rows[2])
    shards.rank_path(path, 2).write_bytes(rows[0] + rows[2] + rows[3] + b'{"index":')
    shards.rank_path(path, 3).write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "good"),
    [
        (cut_tail, 2),
        (half_line_more, 3),
        (garbage_inside, 2),
        (changed_digit, 2),
        (twice, 3),
        (no_checksums, 3),
        (failed_before, 3),
        (broken_record, 3),
        (left_by_others, 3),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_file_costs_the_damaged_images(
    damage: Callable[[Path], None], good: int, stopped: Path, whole: RunRecord, weights: str, voc: Path, tmp_path: Path
) -> None:
    results = shutil.copytree(stopped, tmp_path / "results")
    damage(shard_in(results))
    record, messages, found = resumed(weights, voc, results)
    assert found == good
    assert areas_of(record) == areas_of(whole) and record.status == "ok" and record.failures == ()
    assert any("were damaged" in message for message in messages) == (damage in (garbage_inside, changed_digit))
    again = Shard(shard_in(results), {**shards.read_header(shard_in(results))}, 21)  # type: ignore[dict-item]
    assert sorted(again.done) == list(range(IMAGES)) and again.damaged == 0
    again.close()


@pytest.mark.parametrize("content", [b"", b'{"version":1,"run_id"', b"\0" * 30 + b"\n" + b"{}\n"])
def test_a_file_without_its_first_line_is_passed_over(
    content: bytes, stopped: Path, whole: RunRecord, weights: str, voc: Path, tmp_path: Path
) -> None:
    """Empty when killed before the first line, which is no loss; else whose it was cannot be told, and it is left alone."""
    results = shutil.copytree(stopped, tmp_path / "results")
    path = shard_in(results)
    path.write_bytes(content)
    if content:
        with pytest.warns(OvbenchWarning, match="is passed over: its first line"):
            assert shards.find_unfinished(path.parent, whole.spec_hash, "x") is None
    else:
        assert shards.find_unfinished(path.parent, whole.spec_hash, "x") is None
        record = ovbench.run(spec(weights), data_root=voc, results=results, workers=0, gallery=0, resume=True)
        assert areas_of(record) == areas_of(whole)
    assert path.read_bytes() == content


# ---- the run: faults injected while it goes


class Fault:
    """Injects one fault into a run.

    Args:
        patch: Undoes what it does.
        options: Options of the run; a fault may add its own.
    """

    def __init__(self, patch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
        self.patch, self.options = patch, options

    def _line(self, action: Callable[[Shard, bytes], None], index: int = 3) -> None:
        sealed = shards.sealed
        line = Shard._line

        def faulty(shard: Shard, content: dict[str, Any]) -> None:
            if content.get("index") == index:
                action(shard, sealed(content))
            line(shard, content)

        self.patch.setattr(Shard, "_line", faulty)

    def ctrl_c_in_the_network(self) -> None:
        self._forward(4, interrupt)

    def sigterm_while_a_line_is_written(self) -> None:
        self._line(lambda shard, data: os.kill(os.getpid(), signal.SIGINT))

    def signal_in_the_final_writing(self) -> None:
        write = store.write
        self.patch.setattr(store, "write", lambda *given: (os.kill(os.getpid(), signal.SIGINT), write(*given))[1])

    def second_signal_while_the_end_is_recorded(self) -> None:
        self.options["on_images"] = at(3, interrupt)
        self.signal_in_the_final_writing()

    def disk_full_within_a_line(self) -> None:
        def full(shard: Shard, data: bytes) -> None:
            soft = os.fstat(shard._fd).st_size + 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        self._line(full)

    def disk_full_at_the_record(self) -> None:
        def full(record: RunRecord, root: Path) -> Path:
            raise store._cannot_write(Path(root), OSError(errno.ENOSPC, "No space left on device"))

        self.patch.setattr(store, "write", full)

    def results_below_a_file(self) -> None:
        (self.options["results"] / "file").write_text("")
        self.options["results"] = self.options["results"] / "file"

    def results_removed_meanwhile(self) -> None:
        self.options["on_images"] = at(3, lambda: shutil.rmtree(self.options["results"]))

    def gallery_cannot_be_written(self) -> None:
        from PIL import Image

        def full(*given: Any, **more: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        self.patch.setattr(Image.Image, "save", full)
        self.options["gallery"] = 2

    def predictions_cannot_be_written(self) -> None:
        self.gallery_cannot_be_written()
        self.options["save_predictions"] = True

    def _reading(self, number: int) -> None:
        read = Images.__getitem__

        def faulty(images: Images, index: int) -> Any:
            if index == 3 and get_worker_info() is not None:
                os.kill(os.getpid(), number)
            return read(images, index)

        self.patch.setattr(Images, "__getitem__", faulty)
        self.options["workers"] = 1

    def reader_killed(self) -> None:
        self._reading(signal.SIGKILL)

    def reader_gets_the_schedulers_signal(self) -> None:
        self._reading(signal.SIGTERM)

    def _forward(self, call: int, action: Callable[[], Any]) -> None:
        from ovbench.methods.clip import Clip

        features, calls = Clip.features, iter(range(1000))

        def faulty(method: Clip, images: torch.Tensor) -> torch.Tensor:
            factor = action() if next(calls) == call else None
            found = features(method, images)
            return found if factor is None else found * factor

        self.patch.setattr(Clip, "features", faulty)

    def no_memory_on_the_gpu(self) -> None:
        def full() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        self._forward(4, full)

    def no_main_memory(self) -> None:
        def full() -> None:
            raise MemoryError

        self._forward(4, full)

    def nan(self) -> None:
        self._forward(4, lambda: float("nan"))

    def fault_in_a_method(self) -> None:
        def wrong() -> None:
            raise KeyError("layer")

        self._forward(4, wrong)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, voc: Path, tmp_path: Path) -> Iterator[Fault]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        yield Fault(patch, {"data_root": voc, "results": tmp_path, "workers": 0, "gallery": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# fault, exit code, message, images that the resumed run finds done; None: nothing is left to resume
FAULTS = [
    (
        Fault.ctrl_c_in_the_network,
        130,
        "Finished images are kept; continue with --resume. Record of the interrupted",
        3,
    ),
    (Fault.sigterm_while_a_line_is_written, 130, "Finished images are kept; continue with --resume", 4),
    (Fault.second_signal_while_the_end_is_recorded, 130, "Record of the interrupted run: ", 3),
    (Fault.signal_in_the_final_writing, 0, "", None),
    (Fault.disk_full_within_a_line, 5, "File too large. Finished images are kept; make room .*--resume", 3),
    (Fault.disk_full_at_the_record, 5, "no space left on the disk.* All images are done and kept; .*--resume", 7),
    (Fault.results_below_a_file, 5, "Cannot write results to .* a part of this path is a file", 0),
    (Fault.results_removed_meanwhile, 0, "", None),
    (Fault.gallery_cannot_be_written, 0, "", None),
    (Fault.predictions_cannot_be_written, 5, "No space left on device. Finished images are kept", 0),
    (Fault.reader_killed, 5, "A process that reads images ended: .*--resume", 1),
    (Fault.reader_gets_the_schedulers_signal, 0, "", None),
    (Fault.no_memory_on_the_gpu, 5, "Out of memory: CUDA out of memory.*--window-batch.*--resume", 3),
    (Fault.no_main_memory, 5, "Out of memory: no more main memory.*--resume", 3),
    (Fault.nan, 5, r"NaN or infinity in the patch logits of .*\.jpg", 3),
    (Fault.fault_in_a_method, 5, "KeyError: 'layer'.* Record of the failed run", 3),
]


@pytest.mark.parametrize(("inject", "code", "message", "kept"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_fault_ends_clearly_and_loses_nothing(
    inject: Callable[[Fault], None], code: int, message: str, kept: int | None, fault: Fault, whole: RunRecord,
    weights: str, voc: Path, tmp_path: Path,
) -> None:  # fmt: skip
    inject(fault)
    found = outcome(lambda: ovbench.run(spec(weights), **fault.options))
    fault.patch.undo()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert found[0] == code and re.search(message, found[1], re.DOTALL), found
    for path in tmp_path.rglob("*.json"):
        store.read(path)  # whole, or not there
    if kept is None:
        [record] = store.load_all(tmp_path)
        assert record.status == "ok" and areas_of(record) == areas_of(whole)
        assert (
            len(image_areas.read(image_areas.path_beside(store.record_path(record, tmp_path)), record).names) == IMAGES
        )
        return
    record, _, first = resumed(weights, voc, tmp_path)
    assert areas_of(record) == areas_of(whole)
    assert first >= kept and (first == kept or inject is Fault.reader_killed)  # how far a reader was ahead is chance


def test_a_run_that_is_going_on_is_not_resumed_twice(
    weights: str, voc: Path, tmp_path: Path, whole: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PATIENCE_S", 0.0)
    seen: list[tuple[int, str]] = []

    def second() -> None:
        options = {"data_root": voc, "results": tmp_path, "workers": 0, "gallery": 0}
        seen.append(outcome(lambda: ovbench.run(spec(weights), **options, resume=True)))
        seen.append(outcome(lambda: ovbench.run(spec(weights), **options)))  # a run of its own may go beside it

    record = ovbench.run(spec(weights), data_root=voc, results=tmp_path, workers=1, gallery=0, on_images=at(3, second))
    assert seen[0][0] == 5 and "Another process is evaluating this run" in seen[0][1]
    assert seen[1] == (0, "")
    assert [areas_of(one) for one in store.load_all(tmp_path)] == [areas_of(whole)] * 2
    assert record.status == "ok"


def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PATIENCE_S", 0.0)
    header = {"spec_hash": "a", "dataset_fingerprint": "b", "run_id": "r", "started": "now"}
    shard = Shard(tmp_path / "x.areas.jsonl", header, 3)
    go, stop = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # a reader that outlives its parent for a moment
        os.write(go[1], b".")
        os.read(stop[0], 1)
        os._exit(0)
    os.read(go[0], 1)
    with pytest.raises(RunError, match="Another process"):
        Shard(shard.path, header, 3)
    shard.close()
    Shard(shard.path, header, 3).close()
    os.write(stop[1], b".")
    assert os.waitpid(child, 0)[1] == 0


def test_signals_wait_for_the_end_of_a_block() -> None:
    done, before = [], signal.getsignal(signal.SIGTERM)  # Ray, used in another test, leaves a handler of its own
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        done.append("whole")
    with held_back(deliver=False):
        signal.raise_signal(signal.SIGTERM)
    assert done == ["whole"] and signal.getsignal(signal.SIGTERM) == before


# ---- images that are missing or cannot be read


def break_image(pair: Any) -> None:
    pair.image.write_bytes(pair.image.read_bytes()[:-500])


def no_image(pair: Any) -> None:
    pair.image.write_bytes(b"no image at all")


def remove_image(pair: Any) -> None:
    pair.image.unlink()


def remove_label(pair: Any) -> None:
    pair.label.unlink()


def other_ids(pair: Any) -> None:
    from PIL import Image

    Image.new("L", Image.open(pair.image).size, 77).save(pair.label)


def other_size(pair: Any) -> None:
    from PIL import Image

    Image.new("L", (17, 11), 1).save(pair.label)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return synth("voc21", tmp_path / "data", images=IMAGES, size=(64, 96))  # the same images as in voc


@pytest.mark.parametrize(
    "damage", [break_image, no_image, remove_image, remove_label, other_ids, other_size], ids=lambda f: f.__name__
)
def test_an_image_that_fails_stops_the_run_or_is_skipped(
    damage: Callable[[Any], None], copy: Path, weights: str, tmp_path: Path, whole: RunRecord, voc: Path
) -> None:
    pairs = benchmarks.get("voc21").pairs(copy)
    damage(pairs[4])
    options: dict[str, Any] = {
        "data_root": copy, "results": tmp_path / "r", "workers": 1, "gallery": 0, "batch": 3, "check": damage != other_ids,
    }  # fmt: skip
    stop = outcome(lambda: ovbench.run(spec(weights), **{**options, "check": False}))
    assert stop[0] == 3 and pairs[4].stem in stop[1]
    missing = damage in (remove_image, remove_label)
    if missing:  # seen before anything is computed
        assert not list((tmp_path / "r").rglob("*.json*"))
    else:  # the others of its batch (3, 4, 5) are not lost
        assert lines_in(tmp_path / "r") == 5
    told: list[str] = []
    record = ovbench.run(spec(weights), **options, on_error="skip", resume=not missing, on_message=told.append)
    assert record.status == "ok" and record.partial and "1 of 7 images failed and were skipped" in str(record.reason)
    [failure] = record.failures
    label = damage in (remove_label, other_ids, other_size)
    assert failure.name == (f"SegmentationClass/{pairs[4].label.name}" if label else pairs[4].image.name)
    assert str(pairs[4].label if label else pairs[4].image) in failure.reason
    assert any(text.startswith("Skipped: ") and pairs[4].stem in text for text in told)
    assert record.metrics is not None and record.metrics.images == IMAGES - 1
    read = image_areas.read(image_areas.path_beside(store.record_path(record, tmp_path / "r")), record)
    assert read.names == tuple(pair.image.name for pair in pairs if pair is not pairs[4])
    ahead = ovbench.run(spec(weights, limit=4), data_root=voc, results=tmp_path / "ahead", workers=0, gallery=0)
    before = image_areas.read(image_areas.path_beside(store.record_path(ahead, tmp_path / "ahead")), ahead)
    assert (read.intersect[:4] == before.intersect).all() and (read.pred[:4] == before.pred).all()


def lines_in(results: Path) -> int:
    return shard_in(results).read_bytes().count(b'"classes"')


def test_no_image_can_be_read(copy: Path, weights: str, tmp_path: Path) -> None:
    for pair in benchmarks.get("voc21").pairs(copy):
        break_image(pair)
    options = {"data_root": copy, "results": tmp_path / "r", "workers": 0, "gallery": 0, "on_error": "skip"}
    code, message = outcome(lambda: ovbench.run(spec(weights), **options))
    assert code == 3 and message.startswith("None of 7 images can be read; the first: ") and "is cut off" in message


def test_the_command_line_lists_what_was_skipped(
    copy: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = benchmarks.get("voc21").pairs(copy)[2]
    no_image(pair)
    command = [
        "run", "-m", "clip", "-d", "voc21", "--data-root", str(copy), "--weights", weights, "--prompts", "plain",
        "-p", "common", "--short-side", "96", "--crop", "96", "--stride", "96", "--results", str(tmp_path / "r"),
        "--workers", "0", "--gallery", "0", "--limit", "4", "--device", "cpu",
    ]  # fmt: skip
    assert run_command([*command, "--on-error", "skip"]) == 0
    out, said = capsys.readouterr()
    assert f"skipped  {pair.image.name}: " in out and "1 of 4 images failed and were skipped" in out
    assert f"Skipped: '{pair.image}'" in said
    assert run_command([*command, "--on-error", "perhaps"]) == 2 and "give 'stop' or 'skip'" in capsys.readouterr().err
    [record] = store.load_all(tmp_path / "r")
    again = verify(record, store.record_path(record, tmp_path / "r"), Given(data_root=copy, weights=Path(weights)))
    assert again.equal and again.images == 3


def test_batches_do_not_depend_on_what_is_done() -> None:
    assert batches(7, 3, ()) == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches(7, 3, {0, 1, 2, 4}) == [[3, 4, 5], [6]]
    shared = [batches(10, 2, {0, 1})[rank::3] for rank in range(3)]
    assert sorted(index for part in shared for batch in part for index in batch) == list(range(2, 10))
