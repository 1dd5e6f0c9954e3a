"""The command ``ovbench`` as a child that ends when whoever started it does.

``python -m ovbench.evaluate.sweep.child ARGUMENTS`` reads its standard input, on which nothing ever comes. At its end (the parent
has closed it, or was killed) the command is interrupted as by SIGTERM, so that a run is recorded and can be resumed. No
signal has to arrive and no process is left behind, wherever the child runs.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

GRACE_S = 60.0  # for the image that is being worked on, and the record


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(130)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv[0] = "ovbench"
    runpy.run_module("ovbench", run_name="__main__", alter_sys=False)
