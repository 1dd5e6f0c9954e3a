"""``ovbench predict``: label maps and overlays for one's own pictures and words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ovbench.cli.console import print_json, print_text, say
from ovbench.cli.run import default_device, parse_options
from ovbench.errors import RunError, UsageError


def predict(
    image: Annotated[Path, typer.Argument(help="Picture (JPEG, PNG, ...).")],
    classes: Annotated[str, typer.Option(help="Words with commas between them, or a file: one class per line, synonyms after commas.")],
    method: Annotated[str, typer.Option("--method", "-m", help="Method; see 'ovbench list methods'.")] = "sc-clip",
    weights: Annotated[str | None, typer.Option(help="Weights file, 'random' or 'builtin'. Default: --pretrained openai.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip tag or hf-hub:org/name.")] = None,
    arch: Annotated[str | None, typer.Option(help="open_clip architecture.")] = None,
    activation: Annotated[str, typer.Option(help="auto, gelu or quickgelu; only for weight files that do not tell.")] = "auto",
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the method.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Label PNG with a palette (class number per pixel).")] = None,
    overlay: Annotated[Path | None, typer.Option("--overlay", "-o", help="Picture with the classes laid over it and a legend. Default without any output: IMAGE-overlay.png.")] = None,
    save_logits: Annotated[Path | None, typer.Option(help="npz: seg_logits (Q, H, W) float32, cosine, before scale and softmax.")] = None,
    save_features: Annotated[Path | None, typer.Option(help="npz: features (N, D) float32 of the whole image, row by row, and grid (h, w).")] = None,
    short_side: Annotated[int, typer.Option(min=0, help="Resize the short side to this many pixels; 0 = as it is.")] = 336,
    mode: Annotated[str | None, typer.Option(help="slide or whole.")] = None,
    crop: Annotated[int | None, typer.Option(help="Window side in pixels.")] = None,
    stride: Annotated[int | None, typer.Option(help="Window step in pixels.")] = None,
    logit_scale: Annotated[float | None, typer.Option(help="Factor on the cosine logits before the softmax.")] = None,
    prob_thd: Annotated[float | None, typer.Option(help="Below this probability: the first class.")] = None,
    area_thd: Annotated[float | None, typer.Option(help="Classes with at most this share are dropped to the first class.")] = None,
    templates: Annotated[str | None, typer.Option(help="imagenet80, plain, or a file with one template per line.")] = None,
    patch_pad: Annotated[str | None, typer.Option(help="Input that is no multiple of the patch: none or symmetric.")] = None,
    pos_interp: Annotated[str | None, typer.Option(help="Position embeddings: offset or size.")] = None,
    window_batch: Annotated[int | None, typer.Option(help="Windows per forward.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print shares of the classes and paths as JSON.")] = False,
) -> None:  # fmt: skip
    """Segments one picture with your own words.

    \b
    Examples:
    ovbench predict street.jpg --classes "road, car, sky" --overlay out.png
    ovbench predict cat.jpg --classes classes.txt --method sc-clip --out label.png --save-logits logits.npz
    """
    import numpy as np
    import torch

    from ovbench import pictures
    from ovbench.model import build_model

    if weights and pretrained:
        raise UsageError("--weights and --pretrained both say where the weights come from: give one of them.")
    if not any((out, overlay, save_logits, save_features, json)):
        overlay = image.with_name(f"{image.stem}-overlay.png")
    words = read_class_list(classes)
    rgb = pictures.read_rgb(image)
    source = weights or pretrained or "openai"
    model = build_model(
        method,
        classes=words,
        weights=source,
        arch=arch,
        activation=activation,
        dtype=dtype,  # type: ignore[arg-type]
        device=device or default_device(),
        window_batch=window_batch,
        seed=seed,
        method_options=parse_options(option or []),
        short_side=short_side,
        mode=mode, crop=crop, stride=stride, logit_scale=logit_scale, prob_thd=prob_thd, area_thd=area_thd,
        templates=templates, patch_pad=patch_pad, pos_interp=pos_interp,
    )  # fmt: skip
    network_input = torch.from_numpy(pictures.resize_short_side(rgb, short_side, model.protocol.long_side)).permute(
        2, 0, 1
    )
    height, width = rgb.shape[:2]
    found = model.patch_logits([network_input], [str(image)])[0]
    with torch.inference_mode():
        labels = model.decide(found, (height, width)).cpu().numpy()
    if source == "builtin":
        say("The built-in CLIP knows drawn scenes only: on photographs its answers mean nothing.")
    names = [entry[0] for entry in model.words]
    colours = pictures.palette(len(names) + 1)[1:]  # without black, which hides the picture
    files: dict[str, Path] = {}
    try:
        if out is not None:
            _parent(out)
            pictures.save_label_png(out, labels, colours)
            files["labels"] = out
        if overlay is not None:
            _parent(overlay)
            picture = pictures.overlay(rgb, labels, colours, names)
            if source == "builtin":
                picture = pictures.stack([picture, pictures.caption("demo: built-in CLIP", picture.width)])
            picture.save(overlay)
            files["overlay"] = overlay
        if save_logits is not None:
            _parent(save_logits)
            full = found.at((height, width)).cpu().numpy()
            with save_logits.open("wb") as file:
                np.savez(file, seg_logits=full, words=np.array(model.query_words))
            files["logits"] = save_logits
        if save_features is not None:
            _parent(save_features)
            features = model.dense_features(network_input).cpu().numpy()
            h, w, _ = features.shape
            with save_features.open("wb") as file:
                np.savez(file, features=features.reshape(h * w, -1), grid=np.array([h, w]))
            files["features"] = save_features
    except OSError as error:
        raise RunError(f"Cannot write '{error.filename}': {error.strerror}.") from error
    except ValueError as error:  # Pillow, for a suffix that it does not know
        raise UsageError(f"Cannot write the picture: {error}. Use a name that ends in .png.") from error
    shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    if json:
        print_json({
            "image": str(image), "size": [height, width], "method": method, "weights": source, "demo": source == "builtin",
            "classes": [{"name": name, "share": float(share)} for name, share in zip(names, shares, strict=True)],
            "files": {key: str(path) for key, path in files.items()},
        })  # fmt: skip
        return
    for index in np.argsort(-shares, kind="stable")[:10]:
        if shares[index]:
            print_text(f"{100 * shares[index]:5.1f} %  {names[index]}")
    for kind, path in files.items():
        print_text(f"{kind:8s} {path}")


def read_class_list(classes: str) -> list[list[str]]:
    """Classes from a file (one per line, synonyms after commas) or from words with commas between them.

    Raises:
        UsageError: Nothing in it, or a file that is not there.
    """
    from ovbench.evaluate.run import read_classes
    from ovbench.model import class_words

    path = Path(classes).expanduser()
    if path.is_file():
        return read_classes(path)
    if path.suffix in {".txt", ".csv", ".lst"} or "/" in classes:
        raise UsageError(
            f"No class list '{classes}'. Give words with commas between them, or a file with one class per line."
        )
    return class_words([word for word in classes.split(",") if word.strip()])


def _parent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
