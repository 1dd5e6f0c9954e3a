"""What the record of a run will say, as far as it can be known before any weights are fetched or a network is built.

With it a record of the same run is recognised without starting the run. Only what is certain counts: where something is
left that may differ, a record is not the same, and the run itself finds out (``skip_recorded``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovbench.evaluate.inputs import classes_of, data_of
from ovbench.hashing import sha256_of_file
from ovbench.models.backbone_constants import Backbone, backbone_named, in_force
from ovbench.paths import user_path
from ovbench.results import store
from ovbench.results.record import RunRecord
from ovbench.spec import RunSpec

if TYPE_CHECKING:
    from ovbench.models.resolve import Resolved

_SUFFIX = "_weights"  # of options that name the weights of a further backbone


@dataclass(frozen=True)
class Expected:
    """The final spec of a run, foretold.

    Attributes:
        spec: With names, versions and hashes filled in as the run does.
        unknown: Fields of it that only the run finds out: of weights behind a name, which the name stands for.
        fingerprint: Of the data.
        certain: Whether all other fields are what the run will say. If not, no record is known to be the same.
        adds: Whether the run adds to the options of the method what it found out of weights and sizes.
    """

    spec: RunSpec
    unknown: tuple[str, ...]
    fingerprint: str
    certain: bool = True
    adds: bool = False

    @property
    def spec_hash(self) -> str:
        """Hash of the spec as foretold; the record's own where it :attr:`is_final`."""
        return self.spec.spec_hash()

    @property
    def is_final(self) -> bool:
        """Whether the run can find out nothing that changes the hash."""
        return self.certain and not self.adds and not self.unknown

    def find(self, root: Path) -> RunRecord | None:
        """The newest whole record of this very run under a folder of records, or None."""
        if not self.certain:
            return None
        folder = root / store.path_name(self.spec.method) / store.path_name(self.spec.dataset)
        for record in reversed(store.load_folder(folder)):
            if record.status == "ok" and not record.partial and self.is_of(record):
                return record
        return None

    def is_of(self, record: RunRecord) -> bool:
        """Whether a record has this spec and this data."""
        if record.provenance.dataset_fingerprint != self.fingerprint:
            return False
        ours, theirs = self.spec.model_dump(mode="json"), record.spec.model_dump(mode="json")
        for name in self.unknown:
            del ours[name], theirs[name]
        return _same_options(ours.pop("method_options"), theirs.pop("method_options")) and ours == theirs


def expected(
    spec: RunSpec, data_root: Path | None, fingerprints: dict[tuple[str, Path], str] | None = None
) -> Expected:
    """Foretells the final spec of ``ovbench.run(spec, data_root=data_root)``.

    Args:
        spec: As the user asks for it.
        data_root: Folder of the dataset; None for demo runs, whose scenes are generated, and benchmarks with a place of
            their own.
        fingerprints: Kept by dataset and root from call to call, since every file is looked at for one.

    Raises:
        UsageError: What the run would also complain of before it starts.
        DataError: The data is not there.
        WeightsError: A weights file cannot be read.
    """
    from ovbench import benchmarks
    from ovbench.models.resolve import resolve

    benchmark = benchmarks.get(spec.dataset)
    root, synthetic = data_of(benchmark, spec, data_root)
    seen = {} if fingerprints is None else fingerprints
    key = (benchmark.name, root)
    if key not in seen:
        seen[key] = benchmark.fingerprint(root)
    path = user_path(spec.weights)
    resolved = resolve(spec.method, spec.weights, spec.method_options, demo=spec.demo)
    found = (_open_vocabulary if resolved.info.takes_words else _closed_set)(spec, path, resolved)
    final = spec.model_copy(
        update={
            **found.fields,
            "method": resolved.info.name,
            "method_options": resolved.recorded(found.options),
            "protocol": classes_of(benchmark, spec)[1],
            "dataset": benchmark.name,
            "dataset_version": benchmark.version,
            "weights": path.name if path.is_file() else spec.weights,
            "demo": synthetic or spec.demo or spec.weights == "builtin" or resolved.demo,
        }
    )
    return Expected(final, found.unknown, seen[key], found.certain, found.adds)


@dataclass(frozen=True)
class _Found:
    """What method and weights say: options and fields of the spec; the rest as in :class:`Expected`."""

    options: Mapping[str, Any]
    fields: Mapping[str, Any]
    unknown: tuple[str, ...] = ()
    certain: bool = True
    adds: bool = False


def _closed_set(spec: RunSpec, path: Path, resolved: Resolved) -> _Found:
    about, public = resolved.about, resolved.public
    likeliest = resolved.cls.DEFAULT_ARCH if public is None else public.arches[0]
    arch = about.arch if about is not None else spec.arch or likeliest
    digest = sha256_of_file(path) if path.is_file() else None
    options = resolved.cls(resolved.info.name, resolved.config).options()
    return _Found(options, {"arch": arch, "weights_sha256": digest})


def _open_vocabulary(spec: RunSpec, path: Path, resolved: Resolved) -> _Found:
    from ovbench.models.method import Method

    cls = resolved.cls
    # A method that reads its files itself may find other things in them than a CLIP.
    if path.is_file() and cls.load.__func__ is not Method.load.__func__:  # type: ignore[attr-defined]
        clip = _Found({}, {"weights_sha256": sha256_of_file(path)}, certain=False)
    else:
        clip = _clip(spec, path)
    options = _options(cls, resolved.config, backbone_named(clip.fields.get("arch")))
    fields = {**clip.fields, "arithmetic": cls.arithmetic(spec.dtype)}
    known = clip.certain and options is not None
    return replace(clip, fields=fields, options=options or {}, certain=known, adds=cls.options is not Method.options)


def _options(cls: Any, config: Any, backbone: Backbone | None) -> dict[str, Any] | None:
    """The config as a record holds it, the options of a wrapped method as ``base.NAME``.

    None where constants depend on the backbone, and its name does not tell which it is.
    """
    from ovbench.registry import method_class, method_info

    if cls.BACKBONES and backbone is None:
        return None
    options = asdict(in_force(config, cls.constants_on(backbone)) if cls.BACKBONES else config)
    if "base_options" in options:
        base = method_class(options["base"])
        theirs = _options(base, base.configure(dict(options.pop("base_options"))), backbone)
        if theirs is None:
            return None
        options |= {
            "base": method_info(options["base"]).name,
            **{f"base.{name}": value for name, value in theirs.items()},
        }
    return options


def _clip(spec: RunSpec, path: Path) -> _Found:
    """What :func:`ovbench.networks.clip_weights.load_clip` will say of the CLIP."""
    import open_clip

    from ovbench.networks.clip_weights import DEFAULT_ARCH
    from ovbench.networks.published import random_digest

    weights, arch = spec.weights, spec.arch or DEFAULT_ARCH
    if weights == "builtin":
        from ovbench.networks.builtin.weights import weights_path

        known = {
            "arch": "builtin-ViT-12x128",
            "activation": "quickgelu",
            "weights_sha256": sha256_of_file(weights_path()),
        }
        return _Found({}, known)
    if path.is_file():
        return _clip_file(spec, path)
    if weights == "random":
        quick = bool((open_clip.get_model_config(arch) or {}).get("quick_gelu"))
        auto = "quickgelu" if quick else "gelu"
        digest = random_digest(arch, spec.seed)
        activation = auto if spec.activation == "auto" else spec.activation
        return _Found({}, {"arch": arch, "activation": activation, "weights_sha256": digest})
    if weights.startswith("hf-hub:"):
        return _Found({}, {"arch": weights}, unknown=("activation", "weights_sha256"))
    entry = open_clip.get_pretrained_cfg(arch, weights) or {}
    activation = "quickgelu" if entry.get("quick_gelu") else "gelu"
    return _Found({}, {"arch": arch, "activation": activation}, unknown=("weights_sha256",), certain=bool(entry))


def _clip_file(spec: RunSpec, path: Path) -> _Found:
    """Of a file, which is read for what tells its activation."""
    import open_clip

    from ovbench.networks.activation import is_quick
    from ovbench.networks.clip_weights import openai_format_arch
    from ovbench.networks.state_dict import read_state_dict

    state, digest = read_state_dict(path), sha256_of_file(path)
    arch_quick = None
    if spec.arch is not None:
        arch_quick = bool((open_clip.get_model_config(spec.arch) or {}).get("quick_gelu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run will say it
        quick = is_quick(path, digest, state, spec.activation, spec.arch, arch_quick)
    arch = spec.arch or openai_format_arch(state, str(path), path=path, digest=digest)
    return _Found({}, {"arch": arch, "activation": "quickgelu" if quick else "gelu", "weights_sha256": digest})


def _same_options(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether recorded options are the foretold ones; what a method found out besides may be there too.

    Of a further backbone's weights a record holds the repository, or a file's name and hash.
    """
    for name, value in json.loads(json.dumps(ours)).items():
        backbone = name.removesuffix(_SUFFIX)
        if backbone != name and ours.get(backbone) == "clip":
            continue  # the method's own CLIP
        if backbone != name and value != "random" and name in theirs:
            if not _same_weights(value, ours.get(backbone), theirs[name], theirs.get(f"{name}_sha256")):
                return False
        elif name not in theirs or theirs[name] != value:
            return False
    from_a_file = ("source_sha256", "trained_on", "training_overrides")
    return all(name in ours for name in from_a_file if name in theirs)


def _same_weights(asked: str | None, backbone: str | None, recorded: str | None, recorded_sha256: str | None) -> bool:
    from ovbench.networks.attention_sd2_weights import HUB

    if asked is None:  # the published ones, known by their repository; or there is no further backbone
        return recorded is None or (recorded == HUB if backbone == "sd2" else "/" in recorded)
    path = user_path(asked)
    if path.is_file():
        return recorded_sha256 == sha256_of_file(path)
    return not path.exists() and recorded == asked  # a repository; of a folder the record has no name that tells
