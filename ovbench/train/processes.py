"""Several processes that train together: joined, agreed, one after the other, and parted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def join(launcher: str, device: str) -> tuple[int, int]:
    """Number of this process and of all processes, joined to the others now.

    Args:
        launcher: ``none``, ``pytorch`` or ``slurm``.
        device: Where this process trains; which of several GPUs is torch's current one, whoever has chosen it.

    Raises:
        UsageError: The launcher has not started this process.
    """
    if launcher == "none":
        return 0, 1
    import torch

    from ovbench.evaluate.ranks import require_started

    if not torch.distributed.is_initialized():
        require_started(launcher)
        # Not mmengine's way, which takes the GPU of the task's number, also where each task sees one GPU.
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def agreed(text: str, launcher: str) -> str:
    """The first process' text, in all processes."""
    if launcher == "none":
        return text
    from mmengine.dist import broadcast_object_list

    box = [text]
    broadcast_object_list(box)
    return box[0]


def any_of(flags: Sequence[bool]) -> list[bool]:
    """Which flags some process has raised, the same list in all processes."""
    import torch
    from mmengine.dist import all_reduce, get_comm_device

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(flags)
    raised = torch.tensor([float(flag) for flag in flags], device=get_comm_device())
    all_reduce(raised, op="max")
    return [bool(flag) for flag in raised]


@contextmanager
def first_alone(launcher: str, rank: int) -> Iterator[None]:
    """The first process goes through the block before the others, which find what it has made."""
    if launcher != "none" and rank > 0:
        _wait()
    yield
    if launcher != "none" and rank == 0:
        _wait()


def part(launcher: str) -> bool:
    """Ends the processes' being together after a training; True in the one that goes on alone."""
    if launcher == "none":
        return True
    import torch

    first = torch.distributed.get_rank() == 0
    _wait()
    torch.distributed.destroy_process_group()
    return first


def _wait() -> None:
    import torch

    torch.distributed.barrier()
