"""What keeps two measurements from standing beside each other: trust, settings, machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ovbench.results.record import Environment, RunRecord

# What sets runs apart from results, with the words that say so.
KINDS = {
    "demo": "DEMO, built-in CLIP on generated scenes: a check of the pipeline, no evidence about real images",
    "builtin-weights": "BUILT-IN WEIGHTS, trained on generated scenes only: the accuracy means nothing",
    "random-weights": "RANDOM WEIGHTS: a check of the path, the accuracy means nothing",
    "partial": "PARTIAL, not all images of the benchmark",
}

# Fields of the environment that times and memory depend on; the precision settings come besides.
MACHINE = ("device", "cpu", "cores", "threads", "gpu", "gpu_driver", "cuda", "torch", "os")


def kind_of(record: RunRecord) -> tuple[str, ...]:
    """What keeps a run out of the results proper, names of :data:`KINDS`; empty for a result."""
    builtin = record.spec.weights == "builtin"
    holds = {
        "demo": record.demo,
        "builtin-weights": builtin and not record.demo,
        "random-weights": random_parts(record.spec.weights, record.spec.method_options) != (),
        # Generated copies never have a benchmark's number of images: "demo" says enough.
        "partial": record.partial and not record.demo,
    }
    return tuple(name for name in KINDS if holds[name])


def random_parts(weights: str | None, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The networks that were not trained: ``weights``, and options such as ``attention_weights`` that say "random"."""
    parts = ("weights",) if weights == "random" else ()
    return parts + tuple(
        name for name, value in sorted(options.items()) if name.endswith("weights") and value == "random"
    )


def machine_of(environment: Environment) -> dict[str, str]:
    """The machine fields of an environment with the precision settings, as text."""
    fields = {name: str(getattr(environment, name)) for name in MACHINE}
    for name, value in environment.precision.model_dump().items():
        fields[f"precision {name}"] = str(value)
    return fields


def differing(entries: Iterable[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The fields in which entries differ, each with its values in sorted order."""
    found = list(entries)
    names = dict.fromkeys(name for entry in found for name in entry)
    values = {name: tuple(sorted({entry.get(name, "none") for entry in found})) for name in names}
    return {name: kinds for name, kinds in values.items() if len(kinds) > 1}


def data_of(record: RunRecord) -> dict[str, str]:
    """What was evaluated: benchmark, its version, the copy on disk and the number of images."""
    return {
        "dataset": record.spec.dataset,
        "benchmark version": str(record.spec.dataset_version),
        "dataset fingerprint": (record.provenance.dataset_fingerprint or "unknown")[:8],
        "images": str(record.metrics.images if record.metrics else 0),
    }


def protocol_of(record: RunRecord) -> dict[str, str]:
    """Every field of the protocol as text, hashes cut to 8 digits; ``name`` and ``overrides`` first."""
    protocol = record.spec.protocol.model_dump()
    fields = {}
    for name, value in protocol.items():
        if name == "overrides":
            fields[name] = ", ".join(value) or "none"
        else:
            fields[name] = str(value)[:8] if name.endswith("_sha256") and value else str(value)
    return fields


def settings_of(record: RunRecord) -> dict[str, str]:
    """Everything besides the protocol that makes two runs of one benchmark different runs, as text."""
    spec = record.spec
    return {
        "method": spec.method,
        **{f"option {name}": str(value) for name, value in sorted(spec.method_options.items())},
        "arch": str(spec.arch),
        "weights": spec.weights,
        "weights sha256": (record.provenance.weights_sha256 or "unknown")[:8],
        "activation": spec.activation,
        "dtype": spec.dtype,
        "compile mode": spec.compile_mode,
        "window batch": "auto" if spec.window_batch is None else str(spec.window_batch),
        "batch": str(None if record.efficiency is None else record.efficiency.batch),
        "processes": str(1 if record.efficiency is None else record.efficiency.processes),
        "limit": str(spec.limit),
        "seed": str(spec.seed),
    }


def unequal_content(records: Iterable[RunRecord]) -> list[str]:
    """Class words or prompt templates that runs of one benchmark have under one name with different content, in words.

    Presets are shown by name: the same name with other words inside would otherwise pass unseen.
    """
    found = list(records)
    texts = []
    for what in ("wording", "templates"):
        hashes: dict[str, set[str]] = {}
        for record in found:
            protocol = record.spec.protocol
            hashes.setdefault(getattr(protocol, what), set()).add(getattr(protocol, f"{what}_sha256") or "unknown")
        for name, digests in sorted(hashes.items()):
            if len(digests) > 1:
                short = ", ".join(sorted(digest[:8] for digest in digests))
                texts.append(f"rows differ in the content of {what} '{name}': {short}")
    return texts
