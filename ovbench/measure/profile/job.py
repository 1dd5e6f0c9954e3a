"""The profiling process: reads a spec from stdin, measures, and answers in JSON lines on stdout.

Each line is one object: ``{"message": text}`` on the way, at the end ``{"record": ...}`` or ``{"error": ...}``.
:mod:`ovbench.measure.profile.launch` starts it.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from typing import TextIO

from ovbench.errors import OvbenchError, RunError
from ovbench.measure.profile.record import ProfileRecord, ProfileSpec


def main() -> None:
    """Serves one request on stdin and stdout; what libraries print goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    request = json.loads(sys.stdin.read())
    spec = ProfileSpec.model_validate(request["spec"])
    try:
        record = profile_here(spec, command=request["command"], answers=answers)
    except OvbenchError as error:
        _answer(answers, error={"kind": type(error).__name__, "message": str(error)})
    except Exception as error:
        clear = _memory_error(error)
        if clear is None:
            raise
        _answer(answers, error={"kind": type(clear).__name__, "message": str(clear)})
    else:
        _answer(answers, record=record.model_dump(mode="json"))


def profile_here(spec: ProfileSpec, *, command: str, answers: TextIO | None = None) -> ProfileRecord:
    """The profile of a spec, measured in this process.

    Args:
        spec: What to profile.
        command: Command line for the record.
        answers: Where messages go as JSON lines.

    Raises:
        UsageError, WeightsError, RunError: As the building of the subject.
    """
    import torch

    from ovbench.measure.environment import environment, git_state, package_versions
    from ovbench.measure.profile.figures import measure
    from ovbench.measure.profile.subject import build_subject
    from ovbench.results.record import Environment, Provenance, new_run_id

    def tell(text: str) -> None:
        if answers is not None:
            _answer(answers, message=text)

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    started = datetime.now(timezone.utc)
    tell("building")
    subject = build_subject(spec)
    efficiency = measure(subject, tell)
    filled = subject.spec.model_copy(update={"threads": torch.get_num_threads()})
    device = str(filled.device)
    return ProfileRecord(
        schema_version=1,
        run_id=new_run_id(filled.spec_hash(), started),
        spec=filled,
        spec_hash=filled.spec_hash(),
        efficiency=efficiency,
        environment=Environment(**environment(device)),
        provenance=Provenance(
            **git_state(),
            weights_sha256=filled.weights_sha256,
            dataset_fingerprint=None,
            command=command,
            started=started,
            finished=datetime.now(timezone.utc),
            package_versions=package_versions(),
        ),
    )


def _memory_error(error: Exception) -> RunError | None:
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in text.lower() or "not enough memory" in text:
        return RunError(
            f"Out of memory: {text.splitlines()[0]} Use a smaller --batch or --input, --dtype bfloat16, or "
            "--no-throughput."
        )
    return None


def _answer(answers: TextIO, **content: object) -> None:
    answers.write(json.dumps(content, ensure_ascii=True, allow_nan=False) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
