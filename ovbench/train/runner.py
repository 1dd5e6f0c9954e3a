"""mmengine's Runner for training: our loop, which starts anywhere, and hooks for seeds, losses and checkpoints."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from ovbench.mm.compat import prepare

prepare()

from mmengine.hooks import EMAHook, Hook  # noqa: E402
from mmengine.model import BaseModel, MMDistributedDataParallel  # noqa: E402
from mmengine.optim import OptimWrapper  # noqa: E402
from mmengine.registry import LOOPS  # noqa: E402
from mmengine.runner import IterBasedTrainLoop, Runner  # noqa: E402

from ovbench.errors import Interrupted, RunError, WeightsError  # noqa: E402
from ovbench.evaluate.readers import Readers  # noqa: E402
from ovbench.models.trainable import ParameterGroup, Trainable  # noqa: E402
from ovbench.train import accumulation, checkpoint  # noqa: E402
from ovbench.train.data import Positions, TrainingSet, loader, seed_at  # noqa: E402
from ovbench.train.optimizer import optimizer_wrapper, schedulers  # noqa: E402
from ovbench.train.processes import any_of  # noqa: E402
from ovbench.train.recipe import Recipe  # noqa: E402

LESS = "Try a smaller learning rate (--set lr=...), --set grad_clip=1 or --set amp=off."


@dataclass
class Journal:
    """What a training reports to while it runs.

    Attributes:
        folder: Where checkpoints go.
        every: Iterations between checkpoints.
        on_losses: Called with (iterations done, learning rate, losses by name) after every iteration.
        iteration: Iterations done.
        stop_asked: Save after the iteration in flight and end.
        validate: Called with the Runner and the iterations done, after each and before the first; raises ``Interrupted``
            where it is cut short.
    """

    folder: Path
    every: int
    on_losses: Callable[[int, float, dict[str, float]], None] = lambda iteration, lr, losses: None
    iteration: int = 0
    stop_asked: bool = False
    validate: Callable[[Any, int], None] = lambda runner, iteration: None

    def kept(self) -> str:
        """What of the training there is to go on from, as a sentence."""
        found = checkpoint.checkpoints(self.folder)
        if not found:
            return "Nothing was saved yet: the first checkpoint was to come later (--checkpoint-every)."
        return f"The last checkpoint, of iteration {found[-1][0]}, is kept."

    def __deepcopy__(self, memo: dict[int, Any]) -> Journal:
        """Itself: mmengine copies the configs that hand it on, but there is one training."""
        return self


class TrainingModel(BaseModel):  # type: ignore[misc]
    """A trainable network as mmengine wants it: a batch of crops and labels to losses.

    Args:
        network: Has ``losses(images, labels)``; on the device that batches are moved to.
        parts: In how many parts a batch goes through it.
    """

    def __init__(self, network: nn.Module, parts: int = 1) -> None:
        super().__init__()
        self.network, self.parts = network, parts
        self.data_preprocessor.to(next(network.parameters()).device)

    def init_weights(self) -> None:
        """Nothing: the network comes with its weights."""

    def forward(self, image: Tensor, label: Tensor, segments: Any = None, mode: str = "loss") -> dict[str, Tensor]:
        """Losses by name of images (B, 3, S, S), labels (B, S, S) and, where a network takes them, segments."""
        given = {} if segments is None else {"segments": segments}
        losses: dict[str, Tensor] = self.network.losses(image, label, **given)  # type: ignore[operator]
        return losses

    def train_step(self, data: dict[str, Any], optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One step of the optimiser; losses by name."""
        return accumulation.step(self, self, data, optim_wrapper, self.parts)


class ParallelModel(MMDistributedDataParallel):  # type: ignore[misc]
    """A :class:`TrainingModel` in several processes."""

    def train_step(self, data: dict[str, Any], optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One step of the optimiser by the mean gradient of all processes; this one's losses by name."""
        return accumulation.step(self, self.module, data, optim_wrapper, self.module.parts)


class SeedHook(Hook):  # type: ignore[misc]
    """What is drawn in an iteration (dropout, samplers) depends on seed, iteration and process alone."""

    def __init__(self, seed: int, rank: int) -> None:
        self.seed, self.rank = seed, rank

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds all generators."""
        value = seed_at(self.seed, 1, self.rank, runner.iter)
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)


class JournalHook(Hook):  # type: ignore[misc]
    """Losses after every iteration; a checkpoint now and then; NaN ends the training."""

    priority = "VERY_LOW"  # after the schedule and the mean of the weights

    def __init__(self, journal: Journal, stop: int, rank: int, world: int) -> None:
        self.journal, self.stop, self.rank, self.alone, self.lr = journal, stop, rank, world == 1, 0.0

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Notes the learning rate, which the schedule has moved on by the time the losses are known."""
        self.lr = float(runner.optim_wrapper.optimizer.param_groups[0]["lr"])

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Reports and saves."""
        done = runner.iter + 1
        losses = {name: float(value.detach()) for name, value in outputs.items()}
        bad = ", ".join(name for name, value in losses.items() if "loss" in name and not math.isfinite(value))
        # What one process finds or is told, all do: else the others would wait for it.
        ended, asked = any_of((bool(bad), self.journal.stop_asked))
        if ended:
            bad = bad or "the losses of another process"
            raise RunError(f"NaN or infinity in {bad} after {done} iterations. {LESS} {self.journal.kept()}")
        self.journal.iteration = done
        if self.rank == 0:
            self.journal.on_losses(done, self.lr, losses)
            saved = done % self.journal.every == 0 or done == self.stop or asked
            if saved:
                runner.save(self.journal)
            if not asked and self._interrupted(runner, done):
                asked = True
                if not saved:
                    runner.save(self.journal)
        if asked:
            raise KeyboardInterrupt

    def before_train(self, runner: Any) -> None:
        """Validates what a training that is resumed was to validate next."""
        if self.rank == 0 and self._interrupted(runner, runner.iter):
            raise KeyboardInterrupt

    def _interrupted(self, runner: Any, done: int) -> bool:
        """Validates; whether the user has asked for the end meanwhile, which of several processes this one may not decide."""
        try:
            self.journal.validate(runner, done)
        except Interrupted:
            return True
        return self.alone and self.journal.stop_asked


@LOOPS.register_module()
class TrainLoop(IterBasedTrainLoop):  # type: ignore[misc]
    """mmengine's loop over iterations without skipping through what was trained: the loader starts where it should.

    Args:
        runner: The Runner.
        dataloader: Placeholder that mmengine wants; the real one is made when the first iteration is known.
        stop: Iterations to do, all in all.
        start_loader: Makes the loader from the iteration to start with.
    """

    def __init__(self, runner: Any, dataloader: Any, stop: int, start_loader: Callable[[int], Readers]) -> None:
        super().__init__(runner, dataloader, max_iters=max(stop, 1))
        self.start_loader = start_loader

    def run(self) -> nn.Module:
        """Trains from the current iteration on."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        if self._iter < self._max_iters:
            with self.start_loader(self._iter) as reader:
                batches = iter(reader)
                while self._iter < self._max_iters:
                    self.runner.model.train()
                    self.run_iter(next(batches))
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        model: nn.Module = self.runner.model
        return model


class TrainRunner(Runner):  # type: ignore[misc]
    """A Runner that leaves the model on its device and resumes from our checkpoints."""

    resume_from: Path | None = None

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> Any:
        """The model, synchronised over processes where there are several; on the device it was built on."""
        if not self.distributed:
            return model
        device = next(model.parameters()).device
        devices = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch calls broadcast_buffers by another name
            return ParallelModel(model, device_ids=devices, broadcast_buffers=False, find_unused_parameters=True)

    @property
    def plain_model(self) -> Trainable:
        """The network without mmengine's wrappers."""
        model: Any = self.model.module if hasattr(self.model, "module") else self.model
        network: Trainable = model.network
        return network

    def ema(self) -> EMAHook | None:
        """The hook that keeps the running mean, where the recipe has one."""
        return next((hook for hook in self.hooks if isinstance(hook, EMAHook)), None)

    def state(self) -> dict[str, Tensor]:
        """The network's state without parts that no training changes."""
        frozen = self.plain_model.FROZEN
        return {key: value for key, value in self.plain_model.state_dict().items() if not key.startswith(frozen)}

    def averaged_network(self) -> Trainable:
        """The network to evaluate: that of the running mean where there is one."""
        hook = self.ema()
        network: Trainable = self.plain_model if hook is None else hook.ema_model.module.network
        return network

    def averaged_state(self) -> dict[str, Tensor]:
        """Its weights."""
        return self.averaged_network().state_dict()

    def save(self, journal: Journal) -> Path:
        """Writes a checkpoint of the state after ``journal.iteration`` iterations.

        Raises:
            RunError: Weights that are not finite, which the losses tell only an iteration later; or it cannot be written.
        """
        for name, parameter in self.plain_model.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise RunError(
                    f"NaN or infinity in the weights '{name}' after {journal.iteration} iterations. {LESS} "
                    f"{journal.kept()}"
                )
        hook = self.ema()
        return checkpoint.write(
            journal.folder,
            journal.iteration,
            {
                "state_dict": self.state(),
                "optimizer": self.optim_wrapper.state_dict(),
                "schedulers": [scheduler.state_dict() for scheduler in self.param_schedulers or ()],
                "ema": None if hook is None else hook.ema_model.state_dict(),
            },
        )

    def load_or_resume(self) -> None:
        """Restores everything from ``resume_from``; mmengine calls it once all parts are built."""
        if self.resume_from is None:
            return
        content = checkpoint.read(self.resume_from)
        if set(content["state_dict"]) != set(self.state()):
            raise WeightsError(
                f"The checkpoint '{self.resume_from}' is of another network: start anew without --resume."
            )
        self.plain_model.load_state_dict(content["state_dict"], strict=False)
        self.optim_wrapper.load_state_dict(content["optimizer"])
        for scheduler, state in zip(self.param_schedulers or (), content["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        hook = self.ema()
        if hook is not None:
            hook.ema_model.load_state_dict(content["ema"])
        self.train_loop._iter = content["iteration"]


def build_runner(
    network: nn.Module,
    groups: list[ParameterGroup],
    recipe: Recipe,
    images: TrainingSet,
    journal: Journal,
    *,
    seed: int,
    planned: int,
    stop: int,
    device: str,
    workers: int,
    work_dir: Path,
    launcher: str = "none",
    rank: int = 0,
    world: int = 1,
) -> TrainRunner:
    """The Runner of a training.

    Args:
        network: Has ``losses``; on its device.
        groups: What is trained, see :func:`parameter_groups`.
        recipe: How.
        images: On what.
        journal: What it reports to.
        seed: Of everything that is drawn.
        planned: Iterations of the schedule.
        stop: Iterations to do.
        device: cpu or cuda.
        workers: Processes that read images.
        work_dir: For mmengine's own files.
        launcher: mmengine's name of what started the processes.
        rank: Number of this process.
        world: Number of processes; ``recipe.batch`` is split over them.
    """
    each = recipe.batch // world

    def start_loader(first: int) -> Any:
        return loader(images, Positions(len(images), seed, each, first, rank, world), workers, device)

    wrapper = optimizer_wrapper(groups, recipe, device)
    hooks: list[Hook] = [SeedHook(seed, rank), JournalHook(journal, stop, rank, world)]
    if recipe.ema is not None:
        hooks.append(EMAHook(ema_type="ExponentialMovingAverage", momentum=recipe.ema, update_buffers=False))
    return TrainRunner(
        model=TrainingModel(network, recipe.accumulate),
        work_dir=str(work_dir),
        train_dataloader=loader(images, Positions(len(images), seed, each), 0, device),
        train_cfg={"type": TrainLoop, "stop": stop, "start_loader": _Uncopied(start_loader)},
        optim_wrapper=wrapper,
        param_scheduler=schedulers(wrapper.optimizer, recipe, planned) or None,
        default_hooks={"checkpoint": None, "logger": None, "timer": None, "sampler_seed": None},
        custom_hooks=hooks,
        launcher=launcher,
        env_cfg={"dist_cfg": {"backend": "nccl" if device == "cuda" else "gloo"}},
        log_level="ERROR",
        default_scope="mmseg",
        experiment_name=uuid4().hex,  # mmengine keeps one of each name for the life of a process
    )


class _Uncopied:
    """A function that mmengine's copying of configs leaves alone."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __call__(self, first: int) -> Any:
        return self.function(first)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Uncopied:
        return self
