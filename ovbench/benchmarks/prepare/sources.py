"""What people downloaded: folders, zip and tar archives, single files; listed, checked and read, never unpacked."""

from __future__ import annotations

import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ovbench.errors import DataError, UsageError

# A label or image file is far smaller; a larger member is a mistake or a trap.
MOST_BYTES = 1 << 28
# The annotations of PASCAL in Detail have some hundred MB.
MOST_TEXT = 1 << 32
_PLAIN = (".json", ".txt")
_DRIVE = re.compile(r"[A-Za-z]:")
_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    LookupError,
    OverflowError,
)


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        home: The source: a folder, an archive, or the file itself.
        path: '/'-separated path below the folder or in the archive; the name of a single file.
        member: Name of the entry in the archive as it is written there; "" outside archives.
        size: Bytes.
        stamp: Changes when the content does: size with time or checksum.
    """

    home: Path
    path: str
    member: str
    size: int
    stamp: str

    @property
    def where(self) -> str:
        """The file for messages."""
        return f"{self.home}: {self.path}" if self.member else str(self.on_disk)

    @property
    def on_disk(self) -> Path:
        """The path of a file that is not in an archive."""
        return self.home if self.home.is_file() else self.home / self.path


def list_files(source: Path) -> list[SourceFile]:
    """Every file of a source, hidden ones left out, sorted by path.

    Raises:
        UsageError: Nothing is there, or it is neither folder, zip, tar, .json nor .txt.
        DataError: It cannot be read, or an archive has members that no dataset needs: absolute paths, '..', links,
            devices, encrypted or repeated ones. Nothing was written by then.
    """
    if source.is_dir():
        found = list(_walk(source))
    elif not source.is_file():
        raise UsageError(f"The source '{source}' does not exist: give what you downloaded, a folder or an archive.")
    elif source.suffix.lower() in _PLAIN:
        found = [SourceFile(source, source.name, "", *_facts(source.stat()))]
    else:
        with _readable(source):
            if zipfile.is_zipfile(source):
                found = list(_zip_members(source))
            elif tarfile.is_tarfile(source):
                found = list(_tar_members(source))
            else:
                raise UsageError(f"The source '{source}' is no folder, zip or tar archive; is the download complete?")
    return sorted((file for file in found if not _hidden(file.path)), key=lambda file: file.path)


def read(files: Sequence[SourceFile]) -> Iterator[tuple[SourceFile, bytes]]:
    """The content of files of one source; those of an archive in its order.

    Raises:
        DataError: The source is damaged.
    """
    if not files:
        return
    home = files[0].home
    if not files[0].member:
        for file in files:
            with _readable(file.on_disk):
                yield file, file.on_disk.read_bytes()
        return
    wanted = {file.member: file for file in files}
    with _readable(home):
        if zipfile.is_zipfile(home):
            with zipfile.ZipFile(home) as archive:
                for info in archive.infolist():
                    if info.filename in wanted:
                        yield wanted[info.filename], archive.read(info)
        else:
            with tarfile.open(home) as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.name in wanted else None
                    if content is not None:
                        yield wanted[member.name], content.read()


def text_of(file: SourceFile) -> str:
    """A file as UTF-8 text.

    Raises:
        DataError: It is damaged or no text.
    """
    if file.size > MOST_TEXT:
        raise DataError(f"'{file.where}' has {file.size} bytes: no list or annotation file. Fetch it again.")
    [(_, content)] = read([file])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"'{file.where}' is no text. Fetch it again.") from None


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Turns what the libraries raise for damaged files into one error."""
    try:
        yield
    except _BROKEN as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"'{source}' cannot be read: {reason}. Fetch it again, or change its access rights.") from error


def _facts(status: os.stat_result) -> tuple[int, str]:
    return status.st_size, f"{status.st_size}:{status.st_mtime_ns}"


def _hidden(path: str) -> bool:
    """Hidden files, and those that macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _no_access(error: OSError) -> None:
    raise DataError(f"'{error.filename}' cannot be read: {error.strerror}. Change its access rights.") from error


def _walk(source: Path) -> Iterator[SourceFile]:
    seen: set[tuple[int, int]] = set()
    for base, folders, names in os.walk(source, onerror=_no_access, followlinks=True):
        status = os.stat(base)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(base).relative_to(source)
        for name in names:
            path = Path(base, name)
            if not name.startswith(".") and path.is_file():
                yield SourceFile(source, (relative / name).as_posix(), "", *_facts(path.stat()))


def _safe(archive: Path, name: str, harmful: str, seen: set[str] | None) -> str:
    """The normal form of a member's name; refuses members that could lead out of the archive.

    Args:
        archive: For the message.
        name: As it is written there.
        harmful: What is wrong with the member itself, or "".
        seen: The files before it; None for a folder.
    """
    parts = name.replace("\\", "/").split("/")
    kind = harmful
    if name.startswith(("/", "\\")) or _DRIVE.match(name):
        kind = "an absolute path"
    elif ".." in parts:
        kind = "a path with '..'"
    elif "\0" in name:
        kind = "a broken name"
    path = "/".join(part for part in parts if part not in ("", "."))
    if not kind and seen is not None and (path in seen or not path):
        kind = "there twice" if path else "without a name"
    if kind:
        raise DataError(
            f"The archive '{archive}' is refused, nothing was written: its member {name!r} is {kind}, which no official "
            "archive has. Fetch it from its official place, or unpack it yourself and give the folder."
        )
    if seen is not None:
        seen.add(path)
    return path


def _zip_members(source: Path) -> Iterator[SourceFile]:
    seen: set[str] = set()
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            harmful = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "a link" if stat.S_ISLNK(kind) else "a device"
            # orig_filename: zipfile cuts names at a null character.
            harmful = harmful or ("encrypted" if info.flag_bits & 1 else "")
            folder = info.filename.endswith("/")
            path = _safe(source, info.orig_filename, harmful, None if folder else seen)
            if not folder:
                stamp = f"{info.file_size}:{info.CRC:08x}"
                yield SourceFile(source, path, info.filename, info.file_size, stamp)


def _tar_members(source: Path) -> Iterator[SourceFile]:
    seen: set[str] = set()
    with tarfile.open(source) as archive:
        for member in archive:
            if member.isdir():
                _safe(source, member.name, "", None)
                continue
            linked = "a link" if member.issym() or member.islnk() else "a device"
            path = _safe(source, member.name, "" if member.isreg() else linked, seen)
            yield SourceFile(source, path, member.name, member.size, f"{member.size}:{member.mtime}")


def grouped(files: Iterable[SourceFile]) -> dict[Path, list[SourceFile]]:
    """The files by source, in the order of their first."""
    groups: dict[Path, list[SourceFile]] = {}
    for file in files:
        groups.setdefault(file.home, []).append(file)
    return groups
