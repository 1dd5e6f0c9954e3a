"""``ovbench predict``: label maps and overlays for one's own pictures and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovbench.cli import options as o
from ovbench.cli.console import print_json, print_text, progress, say
from ovbench.cli.inputs import (
    choose,
    classes_of_weights,
    default_device,
    method_told,
    overrides_of,
    palette_of,
    parse_options,
    parse_window_batch,
    weights_of,
)
from ovbench.errors import DataError, OvbenchError, RunError, UsageError, unknown_name

if TYPE_CHECKING:
    from ovbench.models.base import Model
    from ovbench.words.class_list import ClassEntry

# What --write may name, and how the file of each is called.
KINDS = {
    "labels": "-labels.png",
    "overlay": "-overlay.png",
    "logits": "-logits.npz",
    "features": "-features.npz",
    "masks": "-masks.npz",
}
SHOWN = 10  # classes printed for one picture
IN_LINE = 3  # classes printed for one of many


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures (JPEG, PNG, ...), or folders of pictures.")],
    classes: o.Classes = None,
    method: o.Method = None,
    solver: o.Solver = None,
    base: o.Base = None,
    attention: o.Attention = None,
    attention_weights: o.AttentionWeights = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = None,
    arch: o.Arch = None,
    activation: o.Activation = "auto",
    option: o.MethodOptions = None,
    out: o.Out = None,
    overlay: Annotated[Path | None, typer.Option("--overlay", help="Picture with the classes laid over it and a legend. Default without any output: IMAGE-overlay.png.", rich_help_panel=o.WORK)] = None,
    out_dir: Annotated[Path | None, typer.Option("--out-dir", help="Folder for the results of several pictures: NAME-labels.png and NAME-overlay.png.", rich_help_panel=o.WORK)] = None,
    write: Annotated[str | None, typer.Option("--write", help=f"What goes to --out-dir: some of {', '.join(KINDS)}.  [default: labels,overlay]", rich_help_panel=o.WORK)] = None,
    save_logits: Annotated[Path | None, typer.Option(help="npz: seg_logits (Q, H, W) float32, cosine, before scale and softmax.", rich_help_panel=o.WORK)] = None,
    save_masks: Annotated[Path | None, typer.Option(help="Mask-based methods, npz: masks (M, h, w) as logits, their embeddings (M, D) and scores (M, classes), words.", rich_help_panel=o.WORK)] = None,
    save_features: Annotated[Path | None, typer.Option(help="npz: features (N, D) float32 of the whole image, row by row, and grid (h, w).", rich_help_panel=o.WORK)] = None,
    short_side: o.ShortSide = None,
    mode: o.Mode = None,
    crop: o.Crop = None,
    stride: o.Stride = None,
    logit_scale: o.LogitScale = None,
    prob_thd: o.ProbThd = None,
    area_thd: o.AreaThd = None,
    background: o.Background = None,
    templates: o.Prompts = None,
    patch_pad: o.PatchPad = None,
    square: o.Square = None,
    pad: o.Pad = None,
    clip_resize: o.ClipResize = None,
    pos_interp: o.PosInterp = None,
    upsample: o.Upsample = None,
    pamr: o.Pamr = None,
    window_batch: o.WindowBatch = "auto",
    dtype: o.Dtype = "float32",
    device: o.Device = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Segments pictures with your own words.

    --out takes the label map: a PNG with a palette, the number of the class at each pixel. Without --method it is what the
    weights file is of, else sc-clip; without --weights and --pretrained on OpenAI's CLIP. Weights of a closed-set method say
    on which classes they were trained.

    \b
    Examples:
    ovbench predict street.jpg --classes "road, car, sky" --overlay out.png
    ovbench predict cat.jpg --classes classes.txt --method sc-clip --out label.png --save-logits logits.npz
    ovbench predict photos/ more.jpg --classes classes.txt --out-dir results
    ovbench predict street.jpg --weights pspnet_r50-d8_512x512_160k_ade20k.pth
    """
    given = locals()
    source = weights_of(weights, pretrained)
    default = None if solver else method_told(source) or "sc-clip"
    hint = "A picture to write is --overlay FILE, which -o was up to 0.1, or --out FILE."
    chosen = parse_options(option, hint=hint)
    method, options = choose(method or default, solver, base, attention, attention_weights, chosen)
    targets = Targets(out, overlay, save_logits, save_features, save_masks)
    many = out_dir is not None or len(images) > 1 or images[0].is_dir()
    kinds = _require_fitting(targets, out_dir, write, many)
    if not many and targets.empty and not json:
        targets = Targets(overlay=images[0].with_name(f"{images[0].stem}-overlay.png"))
    known = classes_of_weights(method, source, options, classes)
    entries = known.entries
    names = [entry.name for entry in entries]
    if background is not None and background not in names:
        raise unknown_name("class for --background", background, names)
    settings: dict[str, Any] = {
        "weights": source, "arch": arch, "activation": activation, "dtype": dtype, "device": device or default_device(),
        "window_batch": parse_window_batch(window_batch), "seed": seed, "method_options": options, **overrides_of(given),
        "background": "named" if background is None else names.index(background),
    }  # fmt: skip
    facts = {"method": method, "weights": source, "demo": source == "builtin"}
    if many:
        assert out_dir is not None  # checked above
        _many(images, out_dir, kinds, Predictor(method, entries, settings, palette_of(known)), facts, json)
    else:
        _one(images[0], targets, Predictor(method, entries, settings, palette_of(known)), facts, json)


@dataclass(frozen=True)
class Targets:
    """The files that one picture's results go to; None where one is not wanted."""

    labels: Path | None = None
    overlay: Path | None = None
    logits: Path | None = None
    features: Path | None = None
    masks: Path | None = None

    @property
    def empty(self) -> bool:
        """Nothing is wanted."""
        return not self.given()

    def given(self) -> dict[str, Path]:
        """The files by kind."""
        return {kind: path for kind in KINDS if (path := getattr(self, kind)) is not None}


@dataclass
class Predictor:
    """A method on a class list, built when the first picture has been read.

    Attributes:
        method: Method id or PATH.py:Class.
        entries: Classes.
        settings: Of :func:`ovbench.models.build.build_model`.
        palette: A colour (red, green, blue) for each class.
    """

    method: str
    entries: Sequence[ClassEntry]
    settings: dict[str, Any]
    palette: list[tuple[int, int, int]]
    _model: Model | None = field(default=None, init=False)

    @property
    def names(self) -> list[str]:
        """Names of the classes, for people."""
        return [entry.name for entry in self.entries]

    def model(self) -> Model:
        """The model, the same one for all pictures."""
        if self._model is None:
            from ovbench.models.build import build_model

            with _located():
                words = [list(entry.words) for entry in self.entries]
                self._model = build_model(self.method, classes=words, **self.settings)
        return self._model

    def segment(self, path: Path, targets: Targets) -> Segmented:
        """One picture read, segmented, and its files written.

        Raises:
            DataError: The picture cannot be read.
            RunError: No result, or the user's own method failed.
            _Unwritable: A file cannot be written.
        """
        import numpy as np
        import torch

        from ovbench import pictures

        image = pictures.read_rgb(path)
        model, (height, width) = self.model(), image.shape[:2]
        if targets.masks is not None and not model.gives_segments:
            raise UsageError(
                f"{self.method} has no masks to save: choose a mask-based method ('ovbench list methods')."
            )
        small = pictures.resize_short_side(image, model.protocol.short_side, model.protocol.long_side)
        network_input = torch.from_numpy(small).permute(2, 0, 1)
        arrays: dict[str, dict[str, Any]] = {}
        with _located():
            found = model.patch_logits([network_input], [str(path)])[0]
            labels = model.decide(found, (height, width)).cpu().numpy()
            if targets.logits is not None:
                full = found.at((height, width)).cpu().numpy()
                arrays["logits"] = {"seg_logits": full, "words": model.query_words}
            if targets.features is not None:
                features = model.dense_features(network_input).cpu().numpy()
                h, w, _ = features.shape
                arrays["features"] = {"features": features.reshape(h * w, -1), "grid": [h, w]}
            if targets.masks is not None:
                arrays["masks"] = {**model.arrays(found), "classes": self.names}  # type: ignore[operator]
        palette = self.palette
        for kind, target in targets.given().items():
            with _writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                if kind == "labels":
                    pictures.save_label_png(target, labels, palette)
                elif kind == "overlay":
                    picture = pictures.overlay(image, labels, palette, self.names)
                    if self.settings["weights"] == "builtin":
                        picture = pictures.stack([picture, pictures.caption("demo: built-in CLIP", picture.width)])
                    picture.save(target)
                else:
                    _save_npz(target, arrays[kind])
        counts = np.bincount(labels.ravel(), minlength=len(self.entries))
        return Segmented(path, (height, width), (counts / labels.size).tolist(), targets.given())


@dataclass(frozen=True)
class Segmented:
    """What became of one picture: its size (height, width), the share of each class, and the files written."""

    path: Path
    size: tuple[int, int]
    shares: list[float]
    files: dict[str, Path]

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """As JSON."""
        return {
            "image": str(self.path),
            "size": list(self.size),
            "classes": [{"name": name, "share": share} for name, share in zip(names, self.shares, strict=True)],
            "files": {kind: str(path) for kind, path in self.files.items()},
        }

    def largest(self, names: Sequence[str], most: int) -> list[tuple[str, float]]:
        """Names and shares of the largest classes."""
        order = sorted(range(len(names)), key=lambda index: -self.shares[index])
        return [(names[index], self.shares[index]) for index in order[:most] if self.shares[index]]


def _require_fitting(targets: Targets, out_dir: Path | None, write: str | None, many: bool) -> list[str]:
    """The kinds of results for a folder; raises ``UsageError`` where options for one and for many pictures are mixed."""
    if not many:
        if write is not None:
            raise UsageError("--write says what goes to --out-dir: give --out-dir as well.")
        return []
    if out_dir is None:
        raise UsageError("Several pictures need a folder for their results: give --out-dir DIR.")
    if not targets.empty:
        options = {
            "labels": "--out", "overlay": "--overlay", "logits": "--save-logits", "features": "--save-features",
            "masks": "--save-masks",
        }  # fmt: skip
        named = ", ".join(options[kind] for kind in targets.given())
        raise UsageError(
            f"{named} names the file of one picture. With --out-dir choose what is written with --write, e.g. --write "
            f"{','.join(targets.given())}."
        )
    kinds = [kind.strip() for kind in (write or "labels,overlay").split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"--write '{write}': give some of {', '.join(KINDS)}, with commas between them.")
    return kinds


def _one(image: Path, targets: Targets, predictor: Predictor, facts: dict[str, Any], json: bool) -> None:
    done = predictor.segment(image, targets)
    _warn(facts)
    report = done.report(predictor.names)
    if json:
        print_json({"image": report["image"], "size": report["size"], **facts, **report})
        return
    for name, share in done.largest(predictor.names, SHOWN):
        print_text(f"{100 * share:5.1f} %  {name}")
    for kind, path in done.files.items():
        print_text(f"{kind:8s} {path}")


def _many(
    images: Sequence[Path], out_dir: Path, kinds: list[str], predictor: Predictor, facts: dict[str, Any], json: bool
) -> None:
    """Every picture after the other; a broken one is named and left out, and the status tells at the end."""
    from ovbench.cli.pictures import gather

    chosen = gather(images, out_dir)
    with _writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    done: list[Segmented] = []
    failed: list[tuple[Path, str]] = []
    predictor.model()  # weights that cannot be had are no fault of a picture
    with progress("images") as on_images:
        for number, picture in enumerate(chosen, 1):
            targets = Targets(**{kind: out_dir / f"{picture.name}{KINDS[kind]}" for kind in kinds})
            try:
                done.append(predictor.segment(picture.path, targets))
            except (_Unwritable, _OwnMethodFailed):
                raise
            except OvbenchError as error:
                failed.append((picture.path, str(error)))
                say(f"Left out: {error}")
            else:
                if not json:
                    _print_line(done[-1], predictor.names)
            on_images(number, len(chosen))
    _warn(facts)
    if json:
        print_json({
            **facts,
            "images": [item.report(predictor.names) for item in done],
            "failed": [{"image": str(path), "reason": reason} for path, reason in failed],
        })  # fmt: skip
    if failed:
        shown = ", ".join(f"'{path}'" for path, _ in failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise DataError(
            f"{len(failed)} of {len(chosen)} pictures were left out: {shown}. The others are in '{out_dir}'."
        )
    say(f"{len(done)} pictures: results in '{out_dir}'.")


def _print_line(done: Segmented, names: Sequence[str]) -> None:
    found = ", ".join(f"{name} {100 * share:.0f} %" for name, share in done.largest(names, IN_LINE))
    print_text(f"{done.path}: {found}")


def _warn(facts: dict[str, Any]) -> None:
    if facts["demo"]:
        say("The built-in CLIP knows drawn scenes only: on photographs its answers mean nothing.")
    elif facts["weights"] == "random":
        say("Random weights: the answers mean nothing.")


class _Unwritable(RunError):
    """A result cannot be written: the next picture's cannot either."""


class _OwnMethodFailed(RunError):
    """The user's own method raised: the next picture would meet the same line."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Unwritable(f"Cannot write '{error.filename or path}': {error.strerror or error}.") from error
    except ValueError as error:  # Pillow, for a suffix that it does not know
        raise UsageError(f"Cannot write the picture: {error}. Use a name that ends in .png.") from error


@contextmanager
def _located() -> Iterator[None]:
    """Errors out of a method file of the user's own, with file and line."""
    from ovbench.models.own_file import own_frame

    try:
        yield
    except OvbenchError:
        raise
    except Exception as error:
        place = own_frame(error)
        if place is None:
            raise
        raise _OwnMethodFailed(f"The method failed: {type(error).__name__}: {error} ({place}).") from error


def _save_npz(path: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    with path.open("wb") as file:  # np.savez would add a suffix to a name without one
        content: Any = {key: np.asarray(value) for key, value in arrays.items()}
        np.savez(file, **content)
