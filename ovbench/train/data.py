"""Training images: which comes when, and how it is augmented, as functions of seed and position alone.

The image at position p of a training, the crop it is cut to and its colours do not depend on how many processes read or
train, nor on where a training was interrupted. So resuming starts at a position and skips nothing.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ovbench.benchmarks import names
from ovbench.benchmarks.benchmark import Benchmark
from ovbench.errors import UsageError
from ovbench.evaluate.readers import Readers
from ovbench.ops.panoptic import NO_SEGMENT, Segments
from ovbench.train.recipe import Recipe

IGNORE = 255
PADDING = (124, 116, 104)  # RGB: the mean colour of ImageNet, which normalisation brings to 0, as mmseg pads


def seed_at(seed: int, *position: int) -> int:
    """A seed below 2**32 for a place in a training; different places have unrelated ones."""
    return int(np.random.SeedSequence([seed, *position]).generate_state(1)[0])


def chosen_images(images: int, fraction: float, seed: int) -> tuple[int, ...] | None:
    """Indices, ascending, of a share of so many images; None for all. A smaller share is a part of any larger one.

    Args:
        images: Number of images N.
        fraction: Share in 0..1; at least one image is chosen.
        seed: Of the choice.
    """
    if fraction == 1:
        return None
    order = np.random.Generator(np.random.PCG64(seed_at(seed, 2))).permutation(images)
    return tuple(sorted(int(index) for index in order[: max(1, round(fraction * images))]))


def pipeline(recipe: Recipe, benchmark: Benchmark) -> list[dict[str, Any]]:
    """The recipe's augmentation as mmseg transforms; of panoptic labels the segments go through them as well."""
    side = (recipe.crop, recipe.crop)
    load, pack = benchmark.label_step, "PackSegInputs"
    if benchmark.panoptic is not None:
        load, pack = {"type": "mmseg.LoadPanopticAnnotations"}, "PackPanopticInputs"
    steps: list[dict[str, Any]] = [
        {"type": "mmengine.LoadCompleteImage"},
        load,
        {
            "type": "RandomResize",
            "scale": tuple(recipe.resize),
            "ratio_range": tuple(recipe.ratio_range),
            "keep_ratio": True,
        },
        {"type": "mmseg.RandomCrop", "crop_size": side, "cat_max_ratio": recipe.cat_max_ratio},
        {"type": "RandomFlip", "prob": recipe.flip},
    ]
    if recipe.photometric:
        steps.append({"type": "mmseg.PhotoMetricDistortion"})
    return [*steps, {"type": f"mmseg.{pack}", "meta_keys": ("img_path", "seg_map_path")}]


class Positions(Sampler[tuple[int, int]]):
    """Endless (image, position) of one process, each pass over the images in a new order.

    Args:
        images: Number of images N.
        seed: Seed of the orders.
        batch: Images per iteration of this process.
        first: Iteration to start with.
        rank: Number of this process.
        world: Number of processes.
    """

    def __init__(self, images: int, seed: int, batch: int, first: int = 0, rank: int = 0, world: int = 1) -> None:
        self.images, self.seed, self.batch, self.first, self.rank, self.world = images, seed, batch, first, rank, world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        iteration, epoch, order = self.first, -1, np.zeros(0, np.int64)
        while True:
            start = (iteration * self.world + self.rank) * self.batch
            for position in range(start, start + self.batch):
                if position // self.images != epoch:
                    epoch = position // self.images
                    order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.images)
                yield int(order[position % self.images]), position
            iteration += 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators (which mmseg's transforms draw from) at a seed, put back afterwards."""
    python, numeric = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)


class TrainingSet(Dataset[dict[str, Any]]):
    """Augmented crops: ``image`` (3, S, S), RGB uint8, and ``label`` (S, S), int64 with 255 ignored.

    With ``segments`` also ``segments``, the :class:`~ovbench.ops.panoptic.Segments` (S, S) of what a panoptic label shows
    in the crop: those without a pixel are left out, crowds are marked.

    Args:
        dataset: mmseg dataset with :func:`pipeline`.
        crop: S; smaller images are padded at the right and bottom, their labels with 255.
        seed: Seed of the augmentation.
        segments: Give the segments as well; only of a panoptic benchmark.
        chosen: Indices of the images that are used; None: all.
    """

    def __init__(
        self, dataset: Any, crop: int, seed: int, segments: bool = False, chosen: Sequence[int] | None = None
    ) -> None:
        self.dataset, self.crop, self.seed, self.segments = dataset, crop, seed, segments
        self.chosen = range(len(dataset)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        number, position = item
        index = self.chosen[number]
        with seeded(seed_at(self.seed, 0, position)):
            sample = self.dataset[index]
        image, label = sample["inputs"].flip(0), sample["data_samples"].gt_sem_seg.data[0].long()
        height, width = label.shape
        if (height, width) != (self.crop, self.crop):
            padded = torch.tensor(PADDING, dtype=image.dtype)[:, None, None].repeat(1, self.crop, self.crop)
            padded[:, :height, :width] = image
            image, label = padded, self._padded(label, IGNORE)
        if not self.segments:
            return {"image": image, "label": label}
        found: Segments = sample["data_samples"].gt_panoptic
        return {"image": image, "label": label, "segments": found._replace(ids=self._padded(found.ids, NO_SEGMENT))}

    def _padded(self, values: Tensor, fill: int) -> Tensor:
        """A map (h, w) in the upper left of one of the crop's size."""
        marked = torch.full((self.crop, self.crop), fill)
        marked[: values.shape[0], : values.shape[1]] = values
        return marked


def training_set(
    benchmark: Benchmark,
    root: Path,
    recipe: Recipe,
    seed: int,
    *,
    segments: bool = False,
    chosen: Sequence[int] | None = None,
) -> TrainingSet:
    """The training images of a benchmark's split under a recipe (``chosen`` ones alone), with their segments where wanted.

    Raises:
        UsageError: Segments of a benchmark that has none.
    """
    if segments and benchmark.panoptic is None:
        raise UsageError(
            f"{benchmark.name} has labels per pixel, no segments. Benchmarks that have: {', '.join(names('panoptic'))}."
        )
    from ovbench.mm.compat import import_mmseg

    mmseg = import_mmseg()
    from mmengine.registry import DefaultScope

    for module in ("mm.label_loading", "mm.panoptic_dataset", "evaluate.loop"):  # they register what the pipeline names
        importlib.import_module(f"ovbench.{module}")
    steps = pipeline(recipe, benchmark)
    cfg = benchmark.dataset_cfg(root, short_side=0, long_side=1, pipeline=steps)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return TrainingSet(mmseg.registry.DATASETS.build(cfg), recipe.crop, seed, segments, chosen)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: tensors stacked, segments as a list, because images have different numbers of them."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {key: values if key == "segments" else torch.stack(values) for key, values in batch.items()}


def loader(images: TrainingSet, positions: Positions, workers: int, device: str) -> Readers:
    """Batches of one process, from the position on that ``positions`` starts with."""
    return Readers(
        images,
        batch_size=positions.batch,
        sampler=positions,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device == "cuda",
        collate_fn=collate,
        drop_last=True,
    )
