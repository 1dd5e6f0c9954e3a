"""Validation while a training runs: the evaluation of ``ovbench run`` on the weights so far, the best kept, branches watched."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovbench import benchmarks
from ovbench.errors import Interrupted
from ovbench.evaluate.run import run
from ovbench.hashing import sha256_of_file
from ovbench.models.closed_set import ClosedSetNetwork
from ovbench.models.closed_set_branches import Branches
from ovbench.models.trained_file import read_about
from ovbench.ops.areas import areas
from ovbench.registry import method_info
from ovbench.results.record import metrics_from_areas
from ovbench.spec import Protocol
from ovbench.spec import protocol as preset
from ovbench.train import record as records
from ovbench.train.plan import Plan, TrainOptions
from ovbench.train.record import TrainSpec, ValidationPoint


def protocol_of(spec: TrainSpec) -> Protocol:
    """What trained weights are evaluated under: the method's protocol, of a closed-set method at the size of the training."""
    resize = spec.recipe.resize
    closed = not method_info(spec.method).takes_words
    sides = {"long_side": max(resize), "short_side": min(resize)} if closed else {}
    return preset("paper", spec.dataset, method=spec.method, **sides)


def evaluation_of(spec: TrainSpec, weights: Path) -> dict[str, Any]:
    """The spec of the run that evaluates the weights of a training on the validation split.

    The device is the one that the training had: which of several GPUs is torch's current one stays as it is.
    """
    return {
        "method": spec.method,
        "dataset": spec.dataset,
        "weights": str(weights),
        "protocol": protocol_of(spec),
        "device": spec.device,
    }


@contextmanager
def generators_kept() -> Iterator[None]:
    """Python's, numpy's and torch's generators are afterwards what they were."""
    python, numeric = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)


class Validation:
    """Scores of a training on the validation split, in ``validation.jsonl``, and the best weights, in ``best.safetensors``.

    Args:
        planned: The training.
        options: Its options; without ``val_every`` nothing is due, and earlier scores stay.
        folder: Its folder.
        done: Iterations that a resumed training has done; later scores are dropped.
        save: Writes the weights after so many iterations to a file.
    """

    def __init__(
        self, planned: Plan, options: TrainOptions, folder: Path, done: int, save: Callable[[Path, Any, int], None]
    ) -> None:
        self.planned, self.options, self.folder, self.save = planned, options, folder, save
        earlier = read_points(folder)
        self.points = [point for point in earlier if point.iteration <= done]
        if len(self.points) < len(earlier):
            self._write()

    def due(self, iteration: int) -> bool:
        """Whether there should be a score after so many iterations and there is none."""
        every = self.options.val_every or 0
        known = any(point.iteration == iteration for point in self.points)
        last = iteration == self.planned.spec.stop
        return bool(every and iteration and not known and (iteration % every == 0 or last))

    @property
    def best(self) -> ValidationPoint | None:
        """The first of the highest scores; None before the first one."""
        return max(self.points, key=lambda point: point.miou, default=None)

    def __call__(self, runner: Any, iteration: int, stop_asked: Callable[[], bool]) -> None:
        """Validates the weights after so many iterations.

        Raises:
            Interrupted: The user wants to stop; nothing of this validation is kept.
        """
        where = self.options
        current = self.folder / f".validation.{os.getpid()}.safetensors"

        def watch(done: int, total: int) -> None:
            if stop_asked():
                raise KeyboardInterrupt

        try:
            with generators_kept():
                self.save(current, runner, iteration)
                found = run(
                    evaluation_of(self.planned.spec, current),
                    data_root=self.planned.root,
                    results=self.folder / "validation",
                    workers=where.workers,
                    gallery=0,
                    command=where.command,
                    on_images=watch,
                )
                branches = self._branches(runner.averaged_network(), watch)
            assert found.metrics is not None  # a run that ends well has some
            point = ValidationPoint(iteration=iteration, miou=found.metrics.miou or 0.0, branches=branches)
            if self.best is None or point.miou > self.best.miou:
                os.replace(current, self.folder / records.BEST)
            self.points.append(point)
            self._write()
        except KeyboardInterrupt:
            raise Interrupted("Interrupted in a validation.") from None
        finally:
            current.unlink(missing_ok=True)
        told = "".join(f", {name} {value:.2f}" for name, value in point.branches.items())
        best = self.best
        assert best is not None  # there is at least this one
        where.on_message(
            f"Validation after {iteration} iterations: mIoU {point.miou:.2f}{told} (best {best.miou:.2f} after "
            f"{best.iteration})"
        )

    def summary(self) -> dict[str, Any]:
        """The fields of the training's record."""
        path, best = self.folder / records.BEST, self.best
        about = read_about(path) if path.is_file() else None
        kept = best is not None and about is not None and about.iterations == best.iteration
        return {
            "validation": tuple(self.points),
            "best_iteration": None if best is None else best.iteration,
            "best_weights_sha256": sha256_of_file(path) if kept else None,
        }

    def _branches(self, network: Any, watch: Callable[[int, int], None]) -> dict[str, float]:
        """MIoU in percent by branch of the network, on the same images at scale 1."""
        if not isinstance(network, ClosedSetNetwork) or not network.branches():
            return {}
        mode = network.training
        try:
            return branch_scores(network, self.planned, watch)
        finally:
            network.train(mode)

    def _write(self) -> None:
        text = "".join(json.dumps(point.model_dump(mode="json")) + "\n" for point in self.points)
        partial = self.folder / f".{records.VALIDATION}.part"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / records.VALIDATION)


def read_points(folder: Path) -> list[ValidationPoint]:
    """The scores in a training's folder, in order."""
    path = folder / records.VALIDATION
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [ValidationPoint(**json.loads(line)) for line in lines]


@torch.inference_mode()
def branch_scores(
    network: ClosedSetNetwork, planned: Plan, watch: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, float]:
    """MIoU in percent of every branch on the validation split; leaves the network in evaluation mode.

    Args:
        network: Of :class:`ClosedSetNetwork`, with branches.
        planned: The training.
        watch: Progress callback (done, total).
    """
    from ovbench.evaluate.session import build_dataset

    benchmark = benchmarks.get(planned.spec.dataset)
    protocol = protocol_of(planned.spec).model_copy(update={"scales": (1.0,), "flip": False})
    dataset = build_dataset(benchmark, planned.root, protocol.short_side, protocol.long_side)
    model, classes = Branches(network, benchmark.class_names, protocol), benchmark.num_classes
    totals = {name: torch.zeros(4, classes, dtype=torch.int64) for name in network.branches()}
    for index in range(len(dataset)):
        sample = dataset[index]
        label = sample["data_samples"].gt_sem_seg.data[0].to(model.device)
        found = model.labels(sample["inputs"].flip(0).to(model.device), (label.shape[-2], label.shape[-1]))
        for name, labels in found.items():
            parts = areas(labels, label, classes, benchmark.ignore_index)
            totals[name] += torch.stack([parts.intersect, parts.union, parts.pred, parts.label]).cpu()
        watch(index + 1, len(dataset))
    return {
        name: metrics_from_areas(benchmark.class_names, *total.tolist(), images=len(dataset)).miou or 0.0
        for name, total in totals.items()
    }
