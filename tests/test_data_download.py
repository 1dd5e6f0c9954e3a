"""``ovbench data download``: a server on this machine that breaks off, lies and redirects; nothing half is ever named."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ovbench import benchmarks
from ovbench.benchmarks import published_files as facts
from ovbench.benchmarks.download.fetch import fetch
from ovbench.benchmarks.download.part import WORK, Part
from ovbench.benchmarks.published_files import Dataset, Download
from ovbench.cli.data import app
from ovbench.errors import DataError, Interrupted, RunError, UsageError

CONTENT = bytes(range(256)) * 9000  # 2.3 MB: three reads
DATASET = Dataset("Things", "https://example.org/things", "direct", None, None)
runner = CliRunner()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``CONTENT`` under every path; what it does wrong is set by a test.

    Attributes:
        cut: Bytes after which answers break off, one for each request; then answers are whole.
        headers: Of every answer, over the usual ones.
        status: Of every answer that is not a redirection.
        to: Where it redirects to.
        ranges: Whether it understands them.
        seen: The ``Range`` of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = CONTENT, '"one"'
        self.cut: list[int] = []
        self.headers: dict[str, str | None] = {}
        self.status, self.to, self.ranges = 200, "", True
        self.stall = 0.0
        self.seen: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/thing.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that has read enough goes away
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.seen.append(wanted)
        if server.to and self.path == "/thing.tar":
            self.send_response(302)
            self.send_header("Location", server.to)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, status = 0, server.status
        fits = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.ranges and fits and status == 200:
            start, status = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), 206
            if start >= len(server.content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        body = server.content[start:]
        usual = {"Content-Length": str(len(body)), "ETag": server.etag, "Content-Type": "application/x-tar"}
        if status == 206:
            usual["Content-Range"] = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
        self.send_response(status)
        for name, value in {**usual, **server.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        body = body[: server.cut.pop(0)] if server.cut else body
        for begin in range(0, len(body), 1 << 16):
            self.wfile.write(body[begin : begin + (1 << 16)])
            time.sleep(server.stall)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def thing(server: Server, **changes: Any) -> Download:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    made = Download(
        "thing.tar", DATASET, "things", None, server.url, None, len(CONTENT), {"sha256": sha256}, "a page", None
    )
    return replace(made, **changes)


def get(download: Download, folder: Path, **options: Any) -> Any:
    return fetch(download, folder, pause=lambda seconds: None, **options)


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_whole_and_verified_and_then_left_alone(server: Server, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    got = get(thing(server), tmp_path / "d", progress=lambda *done: calls.append(done))
    assert (got.there, got.verified, got.bytes, got.address) == (False, "sha256", len(CONTENT), server.url)
    assert got.path.read_bytes() == CONTENT
    assert calls[0] == (0, len(CONTENT)) and calls[-1] == (len(CONTENT), len(CONTENT))
    assert names_in(tmp_path / "d") == [f"{WORK}/thing.tar.got.json", "thing.tar"]
    note = json.loads((tmp_path / "d" / WORK / "thing.tar.got.json").read_text())
    assert note["sha256"] == got.sha256 == hashlib.sha256(CONTENT).hexdigest() and note["verified"] == "sha256"
    again = get(thing(server), tmp_path / "d")
    assert again.there and again.verified == "sha256" and len(server.seen) == 1


@pytest.mark.parametrize("algorithm", ["sha1", "md5"])
def test_weaker_checksums_are_compared_where_no_better_one_is_known(
    algorithm: str, server: Server, tmp_path: Path
) -> None:
    value = hashlib.new(algorithm, CONTENT).hexdigest()
    assert get(thing(server, checksums={algorithm: value}, bytes=None), tmp_path).verified == algorithm


def test_without_a_public_checksum_what_was_got_is_recorded(server: Server, tmp_path: Path) -> None:
    plain = thing(server, checksums={}, checksum_from=None, bytes=None)
    got = get(plain, tmp_path)
    assert got.verified is None and got.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert json.loads((tmp_path / WORK / "thing.tar.got.json").read_text())["verified"] is None


@pytest.mark.parametrize("known", [True, False])
def test_broken_connections_are_taken_up_where_they_broke(known: bool, server: Server, tmp_path: Path) -> None:
    server.cut = [1_000_000, 500_000]
    download = thing(server) if known else thing(server, checksums={}, checksum_from=None, bytes=None)
    assert get(download, tmp_path).path.read_bytes() == CONTENT
    assert server.seen == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_server_without_ranges_begins_again(server: Server, tmp_path: Path) -> None:
    server.cut, server.ranges = [1_000_000], False
    assert get(thing(server), tmp_path).path.read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_begins_again(server: Server, tmp_path: Path) -> None:
    plain = thing(server, checksums={}, checksum_from=None, bytes=None)
    server.cut = [1_000_000, 0, 0, 0, 0, 0]
    with pytest.raises(RunError, match="failed 5 times"):
        get(plain, tmp_path)
    assert (tmp_path / WORK / "thing.tar.part").stat().st_size == 1_000_000
    server.cut, server.content, server.etag = [], b"new" * 700_000, '"two"'
    assert get(plain, tmp_path).path.read_bytes() == server.content
    assert server.seen[-1] == "bytes=1000000-"  # asked for, and answered with the whole new file


def test_too_many_broken_connections_keep_what_is_there(server: Server, tmp_path: Path) -> None:
    pauses: list[float] = []
    server.cut = [1_000_000, *[0] * 5]
    with pytest.raises(RunError, match=r"failed 5 times, last with an end after 1000000 of 2304000 bytes.*is kept"):
        fetch(thing(server), tmp_path, pause=pauses.append)
    assert names_in(tmp_path) == [f"{WORK}/thing.tar.json", f"{WORK}/thing.tar.part"]
    assert pauses == [2.0, 4.0, 8.0, 16.0]
    server.cut = []
    assert get(thing(server), tmp_path).path.read_bytes() == CONTENT
    assert server.seen[-1] == "bytes=1000000-"
    assert names_in(tmp_path) == [f"{WORK}/thing.tar.got.json", "thing.tar"]


def test_a_wrong_checksum_leaves_nothing_and_the_next_try_is_fresh(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(DataError, match=r"has the sha256 \w+, but \w+ is known \(a page\).*removed"):
        get(thing(server), tmp_path)
    assert names_in(tmp_path) == []
    server.content = CONTENT
    assert get(thing(server), tmp_path).verified == "sha256" and server.seen == [None, None]


@pytest.mark.parametrize("status", [404, 403, 410, 401])
def test_what_the_server_does_not_have_is_said_with_the_page_to_see(
    status: int, server: Server, tmp_path: Path
) -> None:
    server.status = status
    with pytest.raises(DataError, match=rf"answers {status} .*See https://example.org/things"):
        get(thing(server), tmp_path)
    assert len(server.seen) == 1 and not (tmp_path / "thing.tar").exists()


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_server_in_trouble_is_asked_again(status: int, server: Server, tmp_path: Path) -> None:
    server.status = status
    with pytest.raises(RunError, match=f"failed 5 times, last with status {status}"):
        get(thing(server), tmp_path)
    assert len(server.seen) == 5


def test_another_length_than_known_is_refused_before_anything_is_read(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 2304000 bytes, but 'thing.tar' is known to have 5"):
        get(thing(server, bytes=5), tmp_path)
    assert not (tmp_path / "thing.tar").exists()


def test_more_than_known_without_a_length_is_cut_short(server: Server, tmp_path: Path) -> None:
    server.headers = {"Content-Length": None}
    with pytest.raises(DataError, match="sends more than 1100000 bytes"):
        get(thing(server, bytes=1_100_000), tmp_path)
    assert (tmp_path / WORK / "thing.tar.part").stat().st_size == 0


def test_a_length_that_is_longer_than_the_content(server: Server, tmp_path: Path) -> None:
    server.headers = {"Content-Length": "9000000"}
    with pytest.raises(RunError, match="failed 5 times"):
        get(thing(server, bytes=None), tmp_path)
    assert not (tmp_path / "thing.tar").exists()


def test_a_web_page_is_no_archive(server: Server, tmp_path: Path) -> None:
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(DataError, match="gives a web page"):
        get(thing(server, bytes=None), tmp_path)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://a/b"])
def test_redirections_to_other_schemes_are_refused(to: str, server: Server, tmp_path: Path) -> None:
    server.to = to
    with pytest.raises(DataError, match=r"refused|answers 302"):
        get(thing(server), tmp_path)
    assert not (tmp_path / "thing.tar").exists() and len(server.seen) == 1


def test_redirections_within_http_are_followed_but_not_for_ever(server: Server, tmp_path: Path) -> None:
    server.to = "/elsewhere/thing.tar"
    assert get(thing(server), tmp_path).address == server.url.replace("/thing", "/elsewhere/thing")
    server.to = "/thing.tar"
    with pytest.raises(DataError, match="answers 302"):
        get(thing(server), tmp_path / "other")


def test_from_https_nothing_leads_back_to_http() -> None:
    import urllib.request

    from ovbench.benchmarks.download.fetch import _SameScheme

    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(DataError, match="from https to http: refused"):
        _SameScheme().redirect_request(request, None, 302, "", {}, "http://example.org/a")
    up = urllib.request.Request("http://example.org/a")
    assert _SameScheme().redirect_request(up, None, 302, "", {}, "https://example.org/a") is not None


def test_an_unreachable_server(server: Server, tmp_path: Path) -> None:
    dead = thing(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(RunError, match="failed 5 times"):
        get(dead, tmp_path)


def test_too_little_space_is_said_before_anything_is_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))
    with pytest.raises(RunError, match=r"takes 0\.00 GB more, but only 0\.00 GB are free"):
        get(thing(server), tmp_path)
    assert not (tmp_path / "thing.tar").exists()


def test_a_full_disk_keeps_what_is_there(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Part.append

    def full(self: Part, chunk: bytes) -> None:
        if self.size >= 1 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(Part, "append", full)
        with pytest.raises(RunError, match=r"no space left on the disk. What was fetched is kept"):
            get(thing(server), tmp_path)
    assert (tmp_path / WORK / "thing.tar.part").stat().st_size == 1 << 20
    assert get(thing(server), tmp_path).verified == "sha256" and server.seen[-1] == "bytes=1048576-"


def test_killed_and_started_again(server: Server, tmp_path: Path) -> None:
    server.stall = 0.05
    code = (
        "import sys; from pathlib import Path\n"
        "from ovbench.benchmarks.download.fetch import fetch\n"
        "from ovbench.benchmarks.published_files import Dataset, Download\n"
        f"d = Dataset(*{('Things', 'https://example.org', 'direct', None, None)!r})\n"
        f"fetch(Download('thing.tar', d, 'x', None, {server.url!r}, None, None, {{}}, None, None), Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "no_proxy": "127.0.0.1"})
    part = tmp_path / WORK / "thing.tar.part"
    try:
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was too quick to be killed"
    kept = part.stat().st_size
    assert kept and not (tmp_path / "thing.tar").exists()
    server.stall = 0.0
    assert get(thing(server), tmp_path).verified == "sha256"
    assert server.seen == [None, f"bytes={kept}-"]


def test_interrupted(server: Server, tmp_path: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="goes on from there"):
        get(thing(server), tmp_path, progress=stop)
    assert (tmp_path / WORK / "thing.tar.part").stat().st_size > 0


def test_two_at_once_do_not_mix(server: Server, tmp_path: Path) -> None:
    met: list[str] = []

    def second(done: int, total: int | None) -> None:
        if not met:
            with pytest.raises(RunError, match=r"Another process downloads 'thing.tar'"):
                get(thing(server), tmp_path)
            met.append("yes")

    assert get(thing(server), tmp_path, progress=second).verified == "sha256" and met


def test_the_last_byte_was_there_but_not_the_name(server: Server, tmp_path: Path) -> None:
    server.cut = [len(CONTENT)]
    get(thing(server), tmp_path)
    work = tmp_path / WORK
    (tmp_path / "thing.tar").rename(work / "thing.tar.part")
    told = {"url": server.url, "address": server.url, "etag": server.etag, "total": len(CONTENT)}
    (work / "thing.tar.json").write_text(json.dumps(told))
    (work / "thing.tar.got.json").unlink()
    assert get(thing(server), tmp_path).verified == "sha256" and server.seen == [None, f"bytes={len(CONTENT)}-"]


def test_files_of_others_are_kept(server: Server, tmp_path: Path) -> None:
    mine = tmp_path / "thing.tar"
    mine.write_bytes(b"short")
    with pytest.raises(DataError, match=r"is there already, but has 5 bytes instead of 2304000: remove it"):
        get(thing(server), tmp_path)
    with pytest.raises(DataError, match=r"is there already, but its sha256 is"):
        get(thing(server, bytes=None), tmp_path)
    assert mine.read_bytes() == b"short" and server.seen == []
    mine.write_bytes(CONTENT)
    got = get(thing(server), tmp_path)
    assert got.there and got.verified == "sha256" and got.address is None
    mine.write_bytes(CONTENT[:-1] + b"x")  # what the note says is not believed of a changed file
    with pytest.raises(DataError, match="sha256"):
        get(thing(server), tmp_path)


def test_links_lead_nowhere(server: Server, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"keep")
    folder = tmp_path / "d"
    (folder / WORK).mkdir(parents=True)
    (folder / WORK / "thing.tar.part").symlink_to(outside)
    with pytest.raises(RunError, match="cannot be written"):
        get(thing(server), folder)
    (folder / WORK / "thing.tar.part").unlink()
    (folder / "thing.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="link to nothing"):
        get(thing(server), folder)
    assert outside.read_bytes() == b"keep" and not (tmp_path / "nowhere").exists()


# The command


@pytest.fixture
def voc_here(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The facts of VOC with the address of the local server."""
    known = dict(facts.all_downloads())
    known["VOCtrainval_11-May-2012.tar"] = thing(server, name="VOCtrainval_11-May-2012.tar")
    monkeypatch.setattr(facts, "all_downloads", lambda: known)
    return server


def test_the_command_fetches_and_says_what_follows(voc_here: Server, tmp_path: Path) -> None:
    arguments = ["download", "voc21", "--out", str(tmp_path / "my files")]
    planned = runner.invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0 and f"would be fetched from {voc_here.url}" in planned.stdout
    assert not (tmp_path / "my files").exists()
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "fetched, 2304000 bytes, sha256 as known" in done.stdout and "Things: licence not known" in done.stderr
    path = tmp_path / "my files" / "VOCtrainval_11-May-2012.tar"
    assert f"Next: ovbench data prepare voc21 --source '{path}' --out data/voc21" in done.stdout
    again = runner.invoke(app, [*arguments, "--json"])
    content = json.loads(again.stdout)
    assert content["fetched"][0]["there_before"] is True and content["fetched"][0]["path"] == str(path)
    assert len(voc_here.seen) == 1


def test_what_needs_registration_is_named_with_the_command_that_follows(tmp_path: Path) -> None:
    result = runner.invoke(app, ["download", "cityscapes", "--out", str(tmp_path / "d")])
    assert result.exit_code == 3
    for part in (
        "leftImg8bit_trainvaltest.zip: fetch it by hand, after registration",
        "11 GB",
        "cityscapes-dataset.com",
    ):
        assert part in result.stdout
    assert "Then: ovbench data prepare cityscapes --source" in result.stdout
    data = json.loads(runner.invoke(app, ["download", "cityscapes", "--out", str(tmp_path), "--json"]).stdout)
    assert [one["name"] for one in data["by_hand"]] == ["leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"]
    for one in data["by_hand"]:
        (tmp_path / one["name"]).write_bytes(b"x")
    assert runner.invoke(app, ["download", "cityscapes", "--out", str(tmp_path)]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["city"], "Did you mean: cityscapes"),
        (["voc21", "--split", "test"], "Unknown split 'test'"),
        (["voc21", "--split", "train"], "no training split"),
        (["voc21", "--out", __file__], "is a file"),
    ],
)
def test_wrong_wishes_are_explained(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["download", *arguments])
    assert isinstance(result.exception, UsageError) and message in str(result.exception)


# The facts


def test_every_benchmark_says_where_each_split_comes_from() -> None:
    for name in benchmarks.names():
        benchmark = benchmarks.get(name)
        assert set(benchmark.downloads) <= set(benchmark.splits)
        for split in benchmark.downloads:
            assert facts.downloads(benchmark, split)
    used = {one for name in benchmarks.names() for files in benchmarks.get(name).downloads.values() for one in files}
    assert used <= set(facts.all_downloads())


def test_missing_facts_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(benchmarks.get("voc21"), downloads={})
    monkeypatch.setattr(benchmarks, "get", lambda name: bare)
    entry = json.loads(runner.invoke(app, ["list", "voc21", "--json"]).stdout)[0]
    assert entry["files"] == [] and entry["access"] is None
    assert "not known" in runner.invoke(app, ["list", "voc21"]).stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": 3}, "licence is 3"),
        ({"homepage": "ftp://x/y"}, "homepage is"),
        ({"extra": 1}, "unknown key extra"),
        ({"access": "secret"}, "access is 'secret'"),
        ({"files": {"../x": {"holds": "x", "size": None, "url": None}}}, "no plain file name"),
        ({"files": {"x": {"holds": "x", "size": None, "url": "file:///etc/passwd"}}}, "x.url is"),
        ({"files": {"x": {"holds": "x", "size": None, "url": None, "md5": "ab"}}}, "x.md5 is 'ab'"),
        ({"files": {"x": {"holds": "x", "size": None, "url": None, "md5": "a" * 32}}}, "both a checksum and"),
        ({"files": {"x": {"holds": "x", "url": None}}}, "x.size is missing"),
        ({"files": {"x": []}}, "'x' is no object"),
        ({"access": "registration", "files": {"x": {"holds": "x", "size": None, "url": "http://a/b"}}}, "registration"),
    ],
)
def test_faulty_facts_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {
        "title": "T",
        "homepage": "https://example.org/",
        "access": "direct",
        "licence": None,
        "licence_page": None,
        "files": {"x": {"holds": "x", "size": None, "url": None}},
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert [one.name for one in facts.read(path)] == ["x"]
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match=message):
        facts.read(path)


def test_the_list_has_everything() -> None:
    entries = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert [entry["name"] for entry in entries] == benchmarks.names()
    ade = next(entry for entry in entries if entry["name"] == "ade20k")
    assert ade["splits"]["train"]["images"] == 20210 and ade["access"] == "direct"
    assert ade["files"][0]["sha1"] and ade["files"][0]["licence"]
    table = runner.invoke(app, ["list"]).stdout
    assert all(name in table for name in benchmarks.names())
    shown = runner.invoke(app, ["list", "context459"]).stdout
    assert "none that is public" in shown and "annotations_detectron2/pc459_val/*.tif" in shown


@pytest.mark.parametrize("verb", ["list", "download", "fingerprint"])
def test_help_has_examples(verb: str) -> None:
    result = runner.invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and "Examples:" in result.stdout


def test_fingerprints(tmp_path: Path) -> None:
    from ovbench.benchmarks.synth.copies import synth

    root = synth("voc21", tmp_path / "a", images=3, size=(48, 64))
    arguments = ["fingerprint", "voc21", "--data-root", str(root)]
    plain = runner.invoke(app, arguments).stdout.strip()
    assert plain == benchmarks.get("voc21").fingerprint(root)
    first = json.loads(runner.invoke(app, [*arguments, "--content", "--json", "--workers", "1"]).stdout)
    assert first["fingerprint"] == plain and re.fullmatch(r"[0-9a-f]{64}", first["content_sha256"])
    assert runner.invoke(app, [*arguments, "--content"]).stdout.splitlines()[1] == f"content {first['content_sha256']}"
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = json.loads(
        runner.invoke(app, ["fingerprint", "voc21", "--data-root", str(copy), "--content", "--json"]).stdout
    )
    assert moved["content_sha256"] == first["content_sha256"]
    label = benchmarks.get("voc21").pairs(copy)[1].label
    content = bytearray(label.read_bytes())
    content[-20] ^= 1  # the same size
    label.write_bytes(content)
    changed = json.loads(
        runner.invoke(app, ["fingerprint", "voc21", "--data-root", str(copy), "--content", "--json"]).stdout
    )
    assert changed["fingerprint"] == plain and changed["content_sha256"] != first["content_sha256"]
