"""A stand-in for ``ovbench run`` in tests of scheduling: ``fake_job.py FOLDER NAME WHAT SECONDS``.

It leaves NAME.PID with its parent's process id in FOLDER, and at its end prints what a run prints, or fails as WHAT says.
As the real child does, it ends when its parent closes its standard input; then it leaves NAME.PID.ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from ovbench.evaluate.sweep.child import _end_with_parent


def main() -> None:
    folder, name, what, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
    mark = folder / f"{name}.{os.getpid()}"

    def ended(number: int, frame: object) -> None:
        mark.with_name(f"{mark.name}.ended").touch()
        os._exit(130)

    signal.signal(signal.SIGTERM, ended)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    partial = folder / f".{name}.{os.getpid()}"
    partial.write_text(f"{os.getppid()} {time.monotonic()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    partial.rename(mark)
    time.sleep(seconds)
    with mark.open("a") as file:
        file.write(f" {time.monotonic()}")
    if what == "fail":
        print("Error: no such thing.", file=sys.stderr)
        sys.exit(3)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "silent":
        return
    if what == "recorded":
        print("Recorded already: x.json", file=sys.stderr)
    print(json.dumps({"run_id": name, "spec_hash": "ab" * 32, "metrics": {"miou": 12.5}}))


main()
