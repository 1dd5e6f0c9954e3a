"""Images of any size through a network in windows, batched over windows and images.

Logits stay at the network's own resolution: averaging windows, upsampling and resizing to the label's size are one pair of
small matrices (:mod:`ovbench.ops.assemble`). The result for an image does not depend on what else is in the batch: at a
fixed ``window_batch`` to the bit (the last batch is padded, because matrix kernels change with the shape), else to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import RunError
from ovbench.models.base import CostForward, Model
from ovbench.ops.assemble import block_matrix
from ovbench.ops.patch_logits import PatchLogits, WindowPlan
from ovbench.ops.windows import Box, patch_padding, starts, windows
from ovbench.spec import DType, Protocol

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_WINDOWS = 32  # windows per forward when window_batch is not set, of 224 x 224 pixels; fewer of larger ones


class WindowedModel(Model):
    """Base of models with windows: subclasses say where they run, what a network input is and what the network gives.

    Args:
        protocol: Windows, scale and thresholds.
        patch: Pixels that one logit stands for; windows are padded to whole patches where the protocol says so.
        dtype: Precision of the network; logits, softmax and sums stay float32.
        window_batch: Windows per forward, the tail padded; None takes up to 32, pads nothing, and goes on with half of
            them when memory runs out.
    """

    network_stage = "backbone"

    def __init__(
        self, protocol: Protocol, *, patch: int, dtype: DType = "float32", window_batch: int | None = None
    ) -> None:
        super().__init__(protocol)
        self.patch = patch
        self.dtype: DType = dtype
        self.window_batch = window_batch
        self._auto_batch = AUTO_WINDOWS
        self.network: Callable[..., Any]  # perhaps compiled

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), RGB 0..255 on the device, as the network wants them, float32."""
        raise NotImplementedError

    def run_network(self, batch: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits (B, Q, h, w) of a network input (B, 3, H, W), and what else there is to keep of each window (B, ...)."""
        raise NotImplementedError

    @torch.inference_mode()
    def patch_logits(self, images: Sequence[Tensor], names: Sequence[str] | None = None) -> list[PatchLogits]:
        """Logits of all windows of each image (3, h, w), at patch resolution."""
        plans = [self._plan(image) for image in images]
        parts: list[list[Tensor]] = [[] for _ in images]
        seen: list[list[Tensor]] = [[] for _ in images]
        # windows of one size, over all images, in reading order
        groups: dict[tuple[int, int], list[tuple[int, Box]]] = {}
        for index, plan in enumerate(plans):
            groups.setdefault(plan.window, []).extend((index, box) for box in plan.boxes())
        for window, jobs in groups.items():
            done = 0
            while done < len(jobs):
                some = jobs[done : done + self.step(window)]
                result = self._attempt(images, some, names)
                if result is None:  # out of memory: once more with half the windows
                    continue
                logits, attention = result
                done += len(some)
                for row, (index, _) in enumerate(some):
                    parts[index].append(logits[row])
                    if attention is not None:
                        seen[index].append(attention[row])
        found = []
        for image, plan, windows_of_image, attended in zip(images, plans, parts, seen, strict=True):
            values = block_matrix(torch.stack(windows_of_image), len(plan.tops), len(plan.lefts))
            grid = (windows_of_image[0].shape[-2], windows_of_image[0].shape[-1])
            attention = torch.stack(attended) if attended else None
            found.append(PatchLogits(values, replace(plan, patches=grid), image, attention))
        return found

    def network_input(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w), RGB 0..255, normalised on the device and padded to whole patches where asked for."""
        batch = self.normalise(images.to(self.device, non_blocking=True))
        left, right, top, bottom = self._padding(images.shape[-2], images.shape[-1])
        return F.pad(batch, (left, right, top, bottom)) if left + right + top + bottom else batch

    def views(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes (h, w) of the windows of one image of this size (h, w)."""
        p, side = self.protocol, max(size)
        boxes = windows(*size, *((side, side) if p.mode == "whole" else (p.crop, p.stride)))
        return [(bottom - top, right - left) for top, left, bottom, right in boxes]

    def cost(self, image: Tensor) -> CostForward:
        """One forward of the network, on a black input of the first of the image's :meth:`views`."""
        views = self.views((int(image.shape[-2]), int(image.shape[-1])))
        batch = self.network_input(torch.zeros(1, 3, *views[0]))

        def run() -> None:
            with self.precision(), self.uncompiled():
                self.run_network(batch)

        shape = "x".join(map(str, batch.shape))
        return CostForward(run, f"{shape}, {self.forward_in_words()}; the first image takes {len(views)}")

    def forward_in_words(self) -> str:
        """One forward, as records say it."""
        return "one forward"

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within it the network runs as ``torch.compile`` was given it."""
        network = self.network
        self.network = getattr(network, "_orig_mod", getattr(network, "_torchdynamo_orig_callable", network))
        try:
            yield
        finally:
            self.network = network

    def step(self, window: tuple[int, int]) -> int:
        """Windows of this size (h, w) that go through the network in one forward now."""
        return self.window_batch or max(1, self._auto_batch * 224**2 // max(window[0] * window[1], 224**2))

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        return patch_padding(height, width, self.patch) if self.protocol.patch_pad == "symmetric" else (0, 0, 0, 0)

    def _plan(self, image: Tensor) -> WindowPlan:
        p, (h, w) = self.protocol, (int(image.shape[-2]), int(image.shape[-1]))
        crop, stride = (max(h, w), max(h, w)) if p.mode == "whole" else (p.crop, p.stride)
        window = (min(crop, h), min(crop, w))
        left, right, top, bottom = self._padding(*window)
        return WindowPlan(
            (h, w), tuple(starts(h, crop, stride)), tuple(starts(w, crop, stride)), window, (top, bottom), (left, right)
        )

    def _attempt(
        self, images: Sequence[Tensor], jobs: list[tuple[int, Box]], names: Sequence[str] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Patch logits (n, Q, h, w) of some windows and the method's attention; None when memory ran out."""
        try:
            return self._forward(images, jobs, names)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            short = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
            if not short or self.window_batch or len(jobs) == 1:
                raise
        box = jobs[0][1]
        while self.step((box[2] - box[0], box[3] - box[1])) > max(1, len(jobs) // 2):
            self._auto_batch -= 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _forward(
        self, images: Sequence[Tensor], jobs: list[tuple[int, Box]], names: Sequence[str] | None
    ) -> tuple[Tensor, Tensor | None]:
        with self.stage("prepare"):
            crops = torch.stack([images[i][:, top:bottom, left:right] for i, (top, left, bottom, right) in jobs])
            if self.window_batch and len(jobs) < self.window_batch:
                crops = torch.cat([crops, crops.new_zeros(self.window_batch - len(jobs), *crops.shape[1:])])
            batch = self.network_input(crops)
        with self.stage(self.network_stage), self.precision():
            result = self.run_network(batch)
            logits, attention = result if isinstance(result, tuple) else (result, None)
            logits = logits[: len(jobs)].float()
        finite = logits.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            index, box = jobs[int((~finite).nonzero()[0, 0])]
            name = names[index] if names else f"image {index} of the batch"
            raise RunError(
                f"NaN or infinity in the patch logits of {name}, window {box} (stage: {self.network_stage}, {self.dtype}). "
                f"{'Try --dtype float32 or bfloat16.' if self.dtype == 'float16' else 'Check the weights file.'}"
            )
        return logits, attention

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to the model's dtype, under which its networks run."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])
