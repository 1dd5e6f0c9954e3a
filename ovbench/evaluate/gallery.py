"""Pictures of a run: prediction PNGs and the overlay gallery.

Rows of the gallery lie in files until the run ends, so that a resumed run and all processes of one add to the same sheet.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovbench.benchmarks.benchmark import Benchmark
from ovbench.evaluate.state import State

ROWS = "gallery-rows"


class Pictures:
    """Prediction PNGs and the overlay gallery of a run.

    Args:
        state: The run.
        benchmark: Names and palette.
    """

    def __init__(self, state: State, benchmark: Benchmark) -> None:
        self.state, self.benchmark = state, benchmark
        self.folder = state.opened.path.with_name(state.run_id)

    @property
    def wanted(self) -> bool:
        """Whether any picture is to be made."""
        return self.state.options.save_predictions or self.state.options.gallery > 0

    def keep(self, index: int, sample: Any) -> None:
        """Called with every finished image."""
        from ovbench import pictures

        options = self.state.options
        in_gallery = index < options.gallery
        if not (options.save_predictions or in_gallery):
            return
        pred = sample["pred_sem_seg"]["data"][0].cpu().numpy()
        path = Path(sample["img_path"])
        if options.save_predictions:
            (self.folder / "predictions").mkdir(parents=True, exist_ok=True)
            pictures.save_label_png(self.folder / "predictions" / f"{path.stem}.png", pred, self.benchmark.palette)
        if in_gallery:
            truth = sample["gt_sem_seg"]["data"][0].cpu().numpy()
            names: Sequence[str] = self.benchmark.class_names
            image = pictures.read_rgb(path)
            if image.shape[:2] == pred.shape:
                row = pictures.gallery_row(image, pred, np.asarray(truth), self.benchmark.palette, names, path.name)
                self._save(row, self.folder / ROWS / f"{index:06d}.png")

    def _save(self, picture: Any, path: Path) -> None:
        """Writes a picture whole or not at all; one that cannot be written must not end the run."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(partial, format="PNG")
            os.replace(partial, path)
        except OSError as error:
            self.state.options.on_message(f"No picture '{path}': {error.strerror or error}.")
        finally:
            partial.unlink(missing_ok=True)

    def finish(self) -> None:
        """Writes the gallery as one PNG."""
        from PIL import Image

        from ovbench import pictures

        rows = []
        for path in sorted((self.folder / ROWS).glob("*.png")):
            with Image.open(path) as row:
                rows.append(row.convert("RGB"))
        if rows:
            spec = self.state.spec
            title = f"{spec.method} on {spec.dataset}" + (" - demo: no evidence about the method" if spec.demo else "")
            sheet = pictures.stack([pictures.caption(title, rows[0].width), *rows], gap=10)
            self._save(sheet, self.folder / "gallery.png")
            shutil.rmtree(self.folder / ROWS, ignore_errors=True)
