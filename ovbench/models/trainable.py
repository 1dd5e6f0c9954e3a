"""What can be trained: the interface between networks and ``ovbench train``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ovbench.errors import UsageError


class ParameterGroup(NamedTuple):
    """Parameters that are trained alike.

    Attributes:
        name: Part of the network, for the report.
        parameters: The tensors.
        lr_mult: Factor on the recipe's learning rate.
        decay_mult: Factor on its weight decay.
        undecayed: Those of the tensors that do not decay at all.
        head: A decode head or an auxiliary one, which the recipe's ``head_lr_mult`` is for.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    lr_mult: float = 1.0
    decay_mult: float = 1.0
    undecayed: tuple[nn.Parameter, ...] = ()
    head: bool = False


class Trainable(nn.Module):
    """Base of networks that a training takes; they have ``losses(images, labels)`` and ``parameter_groups(policy)`` besides.

    Class attributes:
        FROZEN: Beginnings of keys of the state that no training changes and no checkpoint holds.
    """

    FROZEN: ClassVar[tuple[str, ...]] = ()

    def recompute_activations(self) -> None:
        """Keep less for the backward pass of a training and compute it again: the same losses and gradients, less memory.

        Raises:
            UsageError: Where nothing that is trained is deep enough for it.
        """
        raise UsageError(
            f"{type(self).__name__} trains nothing through whose depth activations are kept: leave "
            "checkpoint_activations away."
        )

    def loss_share(self, labels: Tensor, part: slice) -> float:
        """Share of the losses of a batch that those of some of its images have, where both are means.

        Args:
            labels: (B, H, W), int64, 255 ignored.
            part: Which images.
        """
        return len(labels[part]) / len(labels)

    def branches(self) -> tuple[str, ...]:
        """Names of the classifiers that are trained beside the one that decides, see :meth:`branch_logits`."""
        return ()

    def branch_logits(self, batch: Tensor) -> dict[str, Tensor]:
        """Logits (B, K, h, w) by branch, each on its own grid, of normalised images (B, 3, H, W).

        A branch is a classifier that learns the same classes but does not decide: an auxiliary head, the coarse classifier of
        an add-on. Its mIoU tells whether it has learned anything.
        """
        return {}


def norms_and_biases(network: nn.Module) -> set[int]:
    """Ids of the parameters that recipes commonly leave undecayed: all of norms, and biases."""
    norms = (_NormBase, nn.LayerNorm, nn.GroupNorm)
    found: Iterable[nn.Parameter] = (
        parameter
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name == "bias"
    )
    return {id(parameter) for parameter in found}
