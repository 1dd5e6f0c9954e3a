"""From aggregated costs to a finer grid: upsampling blocks guided by features of earlier CLIP blocks."""

from __future__ import annotations

from torch import Tensor, nn

from ovbench.networks.cost_aggregation.guidance import guided_conv

GROUP = 16  # channels per group of the norms


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with group norm and ReLU.

    Args:
        dim: Channels in.
        out: Channels out.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (dim, out):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.GroupNorm(max(1, out // GROUP), out),
                nn.ReLU(inplace=True),
            ]
        self.double_conv = nn.Sequential(*layers)


class Up(nn.Module):
    """Twice the resolution by a transposed convolution, then two convolutions with the guidance beside.

    Args:
        dim: Channels in.
        out: Channels out.
        guidance_dim: Channels of the guidance; the features fill ``dim`` up.
    """

    def __init__(self, dim: int, out: int, guidance_dim: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(dim, dim - guidance_dim, kernel_size=2, stride=2)
        self.conv = DoubleConv(dim, out)
        self.repeat = False

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Maps (B, T, out, 2h, 2w) of maps (B, T, dim, h, w); guidance (B, G, 2h, 2w)."""
        classes = x.shape[:2]
        first, *rest = self.conv.double_conv
        x = self.up(x.flatten(0, 1)).unflatten(0, classes)
        x = guided_conv(x, guidance, first.weight, repeat=self.repeat).flatten(0, 1)  # type: ignore[arg-type]
        for layer in rest:
            x = layer(x)
        out: Tensor = x.unflatten(0, classes)
        return out
