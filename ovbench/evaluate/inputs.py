"""What a run reads: the data root, generated where a demo has none, and the words of the classes."""

from __future__ import annotations

from pathlib import Path

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.errors import UsageError
from ovbench.hashing import sha256_of
from ovbench.paths import cache_dir, user_path
from ovbench.spec import Protocol, RunSpec
from ovbench.words.class_list import Classes

DEMO_IMAGES = 24
DEMO_SEED = 20261121


def data_of(benchmark: Benchmark, spec: RunSpec, given: Path | None) -> tuple[Path, bool]:
    """The data root, and whether its images are generated."""
    from ovbench.benchmarks import OwnBenchmark, own_root
    from ovbench.benchmarks.synth.copies import is_synthetic, synth

    given = given or own_root(benchmark)
    if spec.demo and given is None and not isinstance(benchmark, OwnBenchmark):
        home = cache_dir() / "demo" / f"{benchmark.name}-v{benchmark.version}-{DEMO_IMAGES}"
        return benchmark.resolve_root(synth(benchmark.name, home, images=DEMO_IMAGES, seed=DEMO_SEED)), True
    if given is None:
        raise UsageError(
            f"Where is {benchmark.title}? Give its folder with --data-root DIR (see 'ovbench list datasets'), or try "
            "the tool on generated scenes with --demo."
        )
    root = benchmark.resolve_root(given)
    return root, is_synthetic(root)


def wording_of(benchmark: Benchmark, spec: RunSpec) -> str:
    """The wording in force: presets name lists of the eight benchmarks, which others do not have."""
    from ovbench.benchmarks import OwnBenchmark

    p = spec.protocol
    chosen = "wording" in p.overrides or p.wording in benchmark.wordings
    fallback = isinstance(benchmark, OwnBenchmark) or benchmark.group != "eight"
    return str(benchmark.wordings[0]) if fallback and not chosen else p.wording


def words_of(benchmark: Benchmark, spec: RunSpec) -> tuple[list[list[str]], str]:
    """Words per class and their hash: a named wording of the benchmark, or a file with one class per line.

    Raises:
        UsageError: Unknown wording, or a file whose number of classes is not the benchmark's.
        NoBackgroundError: The protocol has thresholds, and the benchmark no background.
    """
    spec.protocol.require_background(benchmark.background, benchmark.name)
    name = wording_of(benchmark, spec)
    if name in benchmark.wordings:
        return benchmark.words(name), benchmark.words_sha256(name)
    path = user_path(name)
    if not path.is_file():
        return benchmark.words(name), ""  # raises with the nearest names
    words = read_classes(path)
    if len(words) != benchmark.num_classes:
        raise UsageError(
            f"The class list '{path}' has {len(words)} classes, but {benchmark.name} has {benchmark.num_classes} "
            f"(one line per class in label order{', background first' if benchmark.has_background else ''}): a longer "
            "or shorter list would count the wrong classes."
        )
    return words, sha256_of(words)


def classes_of(benchmark: Benchmark, spec: RunSpec) -> tuple[Classes, Protocol]:
    """The classes that the model is told, and the protocol with its wording and the hashes of words and sentences.

    A method with fixed classes is told their names, and its protocol says nothing of words.

    Raises:
        UsageError: Unknown wording or templates, or a class list that does not fit.
    """
    from ovbench.registry import method_info
    from ovbench.words.embeddings import prompts

    if not method_info(spec.method).takes_words:
        return list(benchmark.class_names), spec.protocol
    words, words_hash = words_of(benchmark, spec)
    every_word = [word for entry in words for word in entry]
    known = {
        "wording": wording_of(benchmark, spec),
        "wording_sha256": words_hash,
        "templates_sha256": prompts(spec.protocol.templates).sha256(every_word),
    }
    return words, spec.protocol.model_copy(update=known)


def read_classes(source: str | Path) -> list[list[str]]:
    """Classes from a file: one class per line, ``name: synonym, synonym`` or ``name, synonym``; empty lines and # comments are skipped.

    Raises:
        UsageError: No class in it.
    """
    from ovbench.words.class_list import read_file

    return [list(entry.words) for entry in read_file(Path(source))]
