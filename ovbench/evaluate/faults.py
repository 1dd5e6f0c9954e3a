"""What ended a run, as an error for users."""

from __future__ import annotations

import errno
import re

from ovbench.errors import OvbenchError, RunError

_NO_MEMORY = ("out of memory", "can't allocate memory")  # of a GPU; of the machine
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}


def clear_error(error: Exception) -> OvbenchError:
    """The error as one for users: our own as they are, those from worker processes unwrapped, memory and disk named."""
    text = str(error)
    if isinstance(error, OvbenchError):
        if text.startswith("Caught "):  # torch puts a worker's whole traceback into the message
            lines = text.strip().splitlines()
            last = next(
                (i for i in range(len(lines) - 1, -1, -1) if re.match(r"ovbench\.errors\.\w+: ", lines[i])), None
            )
            if last is not None:
                error.args = (" ".join(lines[last:]).split(": ", 1)[1],)
        return error
    named = type(error).__name__ == "OutOfMemoryError" or any(said in text.lower() for said in _NO_MEMORY)
    if named or isinstance(error, MemoryError):
        first = (text.splitlines() or ["no more main memory."])[0]
        return RunError(
            f"Out of memory: {first} Use a smaller --window-batch or --batch, or --dtype bfloat16; "
            "finished images are kept, continue with --resume."
        )
    if "torchvision::" in text:
        return RunError(
            f"torch and torchvision do not belong together ({text.splitlines()[0]}). Install both from the same place: "
            "pip install --force-reinstall torch torchvision."
        )
    if "DataLoader worker" in text or isinstance(
        error, (ConnectionError, EOFError)
    ):  # the latter where a batch is fetched
        said = (text.splitlines() or [type(error).__name__])[0]
        return RunError(
            f"A process that reads images ended: {said} Finished images are kept, continue with --resume; "
            "try --workers 0 to see why."
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"'{error.filename}'" if error.filename else "a file"
        return RunError(
            f"Cannot write or read {where}: {error.strerror}. Finished images are kept; make room or permission, and "
            "continue with --resume."
        )
    from ovbench.models.own_file import own_frame

    lines, place = text.strip().splitlines(), own_frame(error)
    where = f" ({place})" if place else ""
    return RunError(f"{type(error).__name__}: {lines[-1] if lines else 'no message'}{where}")
