"""What a network gives for one image: logits at patch resolution, and where its windows lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ovbench.ops.assemble import Weights, assemble, axis_weights
from ovbench.ops.windows import Box


@dataclass(frozen=True)
class WindowPlan:
    """Where the windows of one image lie.

    Attributes:
        size: Network input (h, w) in pixels.
        tops: First row of each row of windows.
        lefts: First column of each column of windows.
        window: Window size (h, w).
        pad_rows: Pixels added above and below every window.
        pad_columns: Pixels added left and right of every window.
        patches: Values per window (h, w), known after the forward.
    """

    size: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    window: tuple[int, int]
    pad_rows: tuple[int, int]
    pad_columns: tuple[int, int]
    patches: tuple[int, int] = (0, 0)

    def boxes(self) -> list[Box]:
        """Boxes (top, left, bottom, right) of all windows in reading order."""
        height, width = self.window
        return [(top, left, top + height, left + width) for top in self.tops for left in self.lefts]


@dataclass(frozen=True)
class PatchLogits:
    """Cosine logits of one image before any upsampling.

    Attributes:
        values: Block matrix (R, C, Q), float32, of the patch values of all windows, words innermost.
        plan: Where the windows lie.
        image: The network input (3, h, w), RGB 0..255, that refinements are guided by.
        attention: What the method said of each window besides, (windows, ...); None where it says nothing.
    """

    values: Tensor
    plan: WindowPlan
    image: Tensor
    attention: Tensor | None = None

    def weights(self, size: tuple[int, int]) -> Weights:
        """Row weights (H, R) and column weights (W, C) to an output size, on the CPU."""
        p = self.plan
        return (
            axis_weights(p.size[0], p.tops, p.window[0], p.patches[0], p.pad_rows, size[0]),
            axis_weights(p.size[1], p.lefts, p.window[1], p.patches[1], p.pad_columns, size[1]),
        )

    def at(self, size: tuple[int, int]) -> Tensor:
        """Window-averaged logits (Q, H, W), float32, resized bilinearly from the network input's size."""
        return assemble(self.values, self.weights(size))

    def on_grid(self, grid: tuple[int, int]) -> Tensor:
        """Window-averaged logits (Q, *grid), float32; the patch values themselves where one window has that grid."""
        plan = self.plan
        if len(plan.tops) * len(plan.lefts) > 1 or any(plan.pad_rows + plan.pad_columns):
            return self.at(grid)
        values = self.values.permute(2, 0, 1)
        if plan.patches == grid:
            return values
        return F.interpolate(values[None], size=grid, mode="bilinear", align_corners=False)[0]
