"""One file over HTTP: resumed where it broke off, whole or not there, compared with what is publicly known of it."""

from __future__ import annotations

import errno
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ovbench import __version__
from ovbench.benchmarks.download.part import CHUNK, WORK, Part, digests_of, held, read_object, write_object
from ovbench.benchmarks.published_files import Download
from ovbench.errors import DataError, Interrupted, RunError

Progress = Callable[[int, int | None], None]

_PASSING = {408, 429}  # of the client's errors those that another attempt may mend
_ATTEMPTS = 5  # without a byte in between
_TIMEOUT = 60.0  # seconds without a byte
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Fetched:
    """A file that is there.

    Attributes:
        there: It was there before.
        address: Where it came from after redirections; None for a file that something else put there.
        verified: Which public checksum it has; None where no public source prints one.
    """

    name: str
    path: Path
    there: bool
    address: str | None
    bytes: int
    sha256: str
    verified: str | None


class _Trouble(Exception):
    """What another attempt may mend."""


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirections within HTTP and from HTTP to HTTPS, nowhere else."""

    max_redirections = 5

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in (old, "https"):
            raise DataError(f"'{req.full_url}' leads to '{newurl}', from {old} to {new}: refused.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS alone: the usual opener would read local files as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SameScheme(),
    ):
        opener.add_handler(handler)
    return opener


def fetch(
    download: Download,
    folder: Path,
    *,
    progress: Progress = lambda done, total: None,
    pause: Callable[[float], None] = time.sleep,
) -> Fetched:
    """The file in ``folder``, fetched now or found there.

    What is known of the file is compared: its size before anything is written, its checksum before it gets its name.
    Unfinished bytes stay in ``.ovbench-download`` in the folder, and the next call goes on from there where the server
    still has the same file.

    Args:
        download: What to fetch; it has a ``url``.
        folder: Where to.
        progress: Called with (bytes there, bytes in all or None).
        pause: Waits some seconds.

    Raises:
        DataError: The server has no such file or another one, or a file of that name is there already and is another.
        RunError: No connection, no space, no permission; what is there is kept.
        Interrupted: Ctrl-C; what is there is kept.
    """
    target = folder / download.name
    try:
        if target.exists() or target.is_symlink():
            return _found(download, target)
        work = folder / WORK
        work.mkdir(parents=True, exist_ok=True)
        path = work / f"{download.name}.part"
        with held(path) as part:
            address = _grow(download, part, work, progress, pause)
            verified = _compare(download, part, path)
            part.move(target, path)
            return _noted(download, target, part.digests["sha256"], verified, address, there=False)
    except KeyboardInterrupt:
        raise Interrupted("Interrupted. What was fetched is kept: the same command goes on from there.") from None
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise RunError(
            f"'{target}' cannot be written: {reason}. What was fetched is kept: mend it and give the same command again."
        ) from error


def _grow(download: Download, part: Part, work: Path, progress: Progress, pause: Callable[[float], None]) -> str:
    """Adds what is missing; gives the address that it came from."""
    tried, most = 0, part.size
    while True:
        try:
            return _attempt(download, part, work, progress)
        except _Trouble as trouble:
            # More than there ever was is progress; a server that lies about sizes gives the same bytes again and again.
            tried = 1 if part.size > most else tried + 1
            most = max(most, part.size)
            if tried >= _ATTEMPTS:
                raise RunError(
                    f"'{download.url}' failed {tried} times, last with {trouble}. What was fetched is kept: the same "
                    f"command goes on from there. The page of the dataset is {download.where}."
                ) from None
            pause(min(2.0**tried, 30.0))


def _attempt(download: Download, part: Part, work: Path, progress: Progress) -> str:
    """One request."""
    request = urllib.request.Request(str(download.url), headers={"User-Agent": f"ovbench/{__version__}"})
    request.add_header("Accept-Encoding", "identity")
    for name, value in _range(download, part).items():
        request.add_header(name, value)
    try:
        with _opener().open(request, timeout=_TIMEOUT) as answer:
            return _take(download, part, work, answer, progress)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and part.size:
                if part.size == part.told.get("total"):  # it broke off between the last byte and its name
                    return str(part.told.get("address") or download.url)
                part.begin({})
                raise _Trouble("a range that the server does not have") from None
            if error.code not in _PASSING and error.code < 500:
                raise DataError(
                    f"'{download.url}' answers {error.code} {error.reason}: the file is not there any more or not for "
                    f"everyone. See {download.where}; a file that you fetched by hand goes to 'ovbench data prepare'."
                ) from None
            raise _Trouble(f"status {error.code}") from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ValueError) as error:
        raise _Trouble(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _range(download: Download, part: Part) -> dict[str, str]:
    """The headers that ask for the rest; empty where the beginning may be of another file."""
    if not part.size or part.told.get("url") != download.url:
        return {}
    etag, modified = part.told.get("etag"), part.told.get("last_modified")
    if isinstance(etag, str) and not etag.startswith("W/"):
        return {"Range": f"bytes={part.size}-", "If-Range": etag}
    if isinstance(modified, str):
        return {"Range": f"bytes={part.size}-", "If-Range": modified}
    # Without either a checksum tells whether the halves fit.
    return {"Range": f"bytes={part.size}-"} if download.checksum else {}


def _take(download: Download, part: Part, work: Path, answer: Any, progress: Progress) -> str:
    """Reads an answer to its end."""
    total = _total(answer, part)
    address = str(answer.url)
    if download.bytes is not None and total is not None and total != download.bytes:
        raise DataError(
            f"'{address}' has {total} bytes, but '{download.name}' is known to have {download.bytes}: it is another file. "
            f"See {download.where}."
        )
    kind = str(answer.headers.get("Content-Type", ""))
    if kind.startswith("text/html"):
        raise DataError(f"'{address}' gives a web page, not '{download.name}'. See {download.where}.")
    if answer.status != 206:
        headers = {"etag": answer.headers.get("ETag"), "last_modified": answer.headers.get("Last-Modified")}
        part.begin({"url": download.url, "address": address, "total": total, **headers})
    _require_space(work, (total or download.bytes or 0) - part.size, download.name)
    most = total or download.bytes
    progress(part.size, most)
    while True:
        # Errors of the connection are not errors of the disk.
        try:
            chunk = answer.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Trouble(f"a broken connection ({error or type(error).__name__})") from None
        if not chunk:
            break
        if most is not None and part.size + len(chunk) > most:
            part.begin({})
            raise DataError(f"'{address}' sends more than {most} bytes: it is another file. See {download.where}.")
        part.append(chunk)
        progress(part.size, most)
    if most is not None and part.size < most:
        raise _Trouble(f"an end after {part.size} of {most} bytes")
    return address


def _total(answer: Any, part: Part) -> int | None:
    """The size of the whole file; None where the server does not say.

    Raises:
        _Trouble: A range that was not asked for.
    """
    if answer.status == 206:
        found = _RANGE.fullmatch(str(answer.headers.get("Content-Range", "")))
        if found is None or int(found[1]) != part.size:
            part.begin({})
            raise _Trouble("a range that was not asked for")
        return None if found[2] == "*" else int(found[2])
    length = str(answer.headers.get("Content-Length", ""))
    return int(length) if length.isdecimal() else None


def _require_space(folder: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"'{name}' takes {needed / 1e9:.2f} GB more, but only {free / 1e9:.2f} GB are free in '{folder.parent}': make "
            "room, or give another --out."
        )


def _compare(download: Download, part: Part, path: Path) -> str | None:
    """Which checksum the part has; drops a part that has another."""
    known = download.checksum
    if known is None:
        return None
    algorithm, value = known
    found = part.digests[algorithm]
    if found != value:
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
        raise DataError(
            f"What came for '{download.name}' has the {algorithm} {found}, but {value} is known ({download.checksum_from}):"
            " it was changed or damaged, and is removed. The same command fetches it again."
        )
    return algorithm


def _found(download: Download, target: Path) -> Fetched:
    """A file that is there already.

    Raises:
        DataError: It is another one.
    """
    if target.is_symlink() and not target.exists():
        raise DataError(f"'{target}' is a link to nothing: remove it.")
    if not target.is_file():
        raise DataError(f"'{target}' is no file: remove it, or give another --out.")
    note, status = read_object(_note(target)), target.stat()
    if (note.get("url"), note.get("bytes"), note.get("mtime_ns")) == (
        download.url,
        status.st_size,
        status.st_mtime_ns,
    ) and isinstance(note.get("sha256"), str):
        return Fetched(
            download.name, target, True, note.get("address"), status.st_size, note["sha256"], note.get("verified")
        )
    if download.bytes is not None and status.st_size != download.bytes:
        raise DataError(
            f"'{target}' is there already, but has {status.st_size} bytes instead of {download.bytes}: remove it, or give "
            "another --out."
        )
    with target.open("rb") as file:
        digests = digests_of(file)
    known = download.checksum
    if known is not None and digests[known[0]] != known[1]:
        raise DataError(
            f"'{target}' is there already, but its {known[0]} is {digests[known[0]]} instead of {known[1]} "
            f"({download.checksum_from}): remove it, or give another --out."
        )
    return _noted(download, target, digests["sha256"], known and known[0], None, there=True)


def _note(target: Path) -> Path:
    return target.parent / WORK / f"{target.name}.got.json"


def _noted(
    download: Download, target: Path, sha256: str, verified: str | None, address: str | None, *, there: bool
) -> Fetched:
    """Writes down what was got, so that the next call need not read it again."""
    status = target.stat()
    found = Fetched(download.name, target, there, address, status.st_size, sha256, verified)
    content: Mapping[str, Any] = {
        "url": download.url,
        "address": address,
        "bytes": found.bytes,
        "mtime_ns": status.st_mtime_ns,
        "sha256": sha256,
        "verified": verified,
    }
    _note(target).parent.mkdir(parents=True, exist_ok=True)
    write_object(_note(target), content)
    return found
