"""Records on disk: ``<root>/<method>/<benchmark>/<run_id>.json``, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from ovbench.errors import DataError, OvbenchWarning, RunError
from ovbench.results.record import RunRecord, migrate
from ovbench.spec import RunSpec

DEFAULT_ROOT = Path("results") / "runs"

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def record_path(record: RunRecord, root: str | os.PathLike[str] = DEFAULT_ROOT) -> Path:
    """Where a record belongs under ``root``."""
    return Path(root) / path_name(record.spec.method) / path_name(record.spec.dataset) / f"{record.run_id}.json"


def path_name(name: str) -> str:
    """A name that is one plain path component: other characters become '-', and a leading dot is dropped."""
    return _UNSAFE.sub("-", name).lstrip(".") or "unnamed"


def ensure_writable(root: str | os.PathLike[str] = DEFAULT_ROOT) -> None:
    """Makes ``root`` and tries a file in it, so that a long run does not find out at its end.

    Raises:
        RunError: The folder cannot be made or written.
    """
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as handle:
            handle.write(b"\0")
    except OSError as error:
        raise _cannot_write(Path(root), error) from error


def write(record: RunRecord, root: str | os.PathLike[str] = DEFAULT_ROOT) -> Path:
    """Stores a record and returns its path; a reader sees the whole file or none.

    Raises:
        RunError: No permission, no space left, or the path is not a folder.
        ValueError: ``spec_hash`` is not the hash of ``spec``.
    """
    if record.spec_hash != record.spec.spec_hash():
        raise ValueError(f"spec_hash {record.spec_hash} is not the hash of spec {record.spec.spec_hash()}")
    path = record_path(record, root)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as handle:
            handle.write(record.to_json())
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def read(path: str | os.PathLike[str]) -> RunRecord:
    """The record in a file, brought to the current schema version.

    Raises:
        DataError: The file is missing, unreadable, no JSON, or no record; names the file and the field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise DataError(f"Cannot read the record '{path}': {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise DataError(f"'{path}' is not a record: it is no valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise DataError(f"'{path}' is not a record: its JSON is no object.")
    try:
        return RunRecord.model_validate_json(json.dumps(migrate(data)))
    except DataError as error:
        raise DataError(f"'{path}': {error}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg']}" for item in error.errors()]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DataError(f"'{path}' is not a record of this schema: {'; '.join(problems[:3])}{more}.") from error


def find_whole(spec: RunSpec, fingerprint: str, root: str | os.PathLike[str] = DEFAULT_ROOT) -> RunRecord | None:
    """The newest record of the same spec and data that is ok and not partial, or None.

    Args:
        spec: As a record holds it: with the hashes of weights, words and templates filled in.
        fingerprint: Of the data.
        root: Folder of the records.
    """
    folder, wanted = Path(root) / path_name(spec.method) / path_name(spec.dataset), spec.spec_hash()
    for record in reversed(load_folder(folder)):
        same = record.spec_hash == wanted and record.provenance.dataset_fingerprint == fingerprint
        if same and record.status == "ok" and not record.partial:
            return record
    return None


def load_folder(folder: Path) -> list[RunRecord]:
    """The records of one method on one benchmark, oldest first; files that are none are passed over."""
    found = []
    for path in sorted(folder.glob("[!.]*.json")):
        with contextlib.suppress(DataError):
            found.append(read(path))
    return found


def load_all(
    root: str | os.PathLike[str] = DEFAULT_ROOT, *, on_problem: Callable[[str], None] | None = None
) -> list[RunRecord]:
    """All records under ``root``, sorted by path; empty when there is no such folder.

    Args:
        root: Folder of ``<method>/<benchmark>/<run_id>.json``.
        on_problem: Gets the message of each file that is no record; None makes it a warning.
    """
    records = []
    for path in sorted(Path(root).glob("*/*/*.json")):
        if path.name.startswith("."):
            continue
        try:
            records.append(read(path))
        except DataError as error:
            if on_problem is None:
                warnings.warn(f"Left out: {error}", OvbenchWarning, stacklevel=2)
            else:
                on_problem(f"Left out: {error}")
    return records


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to read it but to set it
    os.umask(mask)
    return mask


def _cannot_write(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "no permission to write there. Choose another folder with --results DIR"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "no space left on the disk. Free some, or choose another folder with --results DIR"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        advice = "a part of this path is a file. Choose another folder with --results DIR"
    else:
        advice = f"{error.strerror or error}. Choose another folder with --results DIR"
    return RunError(f"Cannot write results to '{path}': {advice}.")
