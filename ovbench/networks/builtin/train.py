"""Trains the built-in CLIP: ``python -m ovbench.networks.builtin.train --out DIR`` (about an hour on two CPU cores).

A batch is 96 scenes of 112 px (or 48 of 160, 24 of 224); prompts are the benchmarks' words in random ImageNet
templates.
The loss, all cosines times a fixed scale of 40 (so that probabilities at an evaluation's scale of 40 to 55 are sharp):

- image level: CLS against captions of some of the visible classes (both ways), and against all class prompts with every
  visible class a positive;
- region level: each patch against all class prompts, its target the share of each class in it (soft on borders),
  classes weighted by count^-1/2, for several read-outs of the last block: value-only, self-self attention (k-k, q-q or
  both, often with a multiple of CLS added), SC-CLIP's, value-only on a random deeper block, and, weakly and against
  targets mixed with the whole image's, the ordinary one;
- patches of blocks 4 and 9 of the same class alike, of different classes below cosine 0.15, ramped in: SC-CLIP presumes
  this of a CLIP, and so small a network does not bring it by itself.

``DIR/checkpoint.pt`` is written every few minutes and resumed from; ``kill -USR1`` lets the learning rate fall to zero
within the next ``--cooldown`` steps and ends. ``--export FILE`` writes a checkpoint in the form that ships.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ovbench.networks.builtin import readouts
from ovbench.networks.builtin.corpus import Batch, Prompts, Scenes, normalise_images

SCALE = 40.0
WARM_UP = 150
VANILLA_WEIGHT = 0.1
VANILLA_BLUR = 0.35  # share of the image's own class mix in the ordinary read-out's targets


def soft_cross_entropy(embeddings: Tensor, text: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean cross-entropy of (B, N, E) against (K, E) prompts with (B, N, K) target shares and (B, N) weights."""
    log_probs = F.log_softmax(SCALE * (embeddings @ text.T), -1)
    return -((target * log_probs).sum(-1) * weight).sum() / weight.sum()


def balance(shares: Tensor) -> Tensor:
    """(B, N) weights of patches: the shares' mean of count^-1/2 over the batch, mean one."""
    counts = shares.sum((0, 1))
    rarity = torch.where(counts > 0, (counts + 4.0).rsqrt(), 0.0)
    weight = shares @ rarity
    return weight / weight.mean()


def separation(tokens: Tensor, shares: Tensor) -> Tensor:
    """How far patches are from "same class: cosine above .75, different: below .15"; pure patches count."""
    cosines = readouts.similarity(tokens)
    pure = shares.amax(-1)
    same = shares @ shares.transpose(1, 2)
    weight = (pure[:, :, None] * pure[:, None, :]) ** 2
    gap = same * F.relu(0.75 - cosines) ** 2 + (1.0 - same) * F.relu(cosines - 0.15) ** 2
    return (weight * gap).sum() / weight.sum()


def losses(model: Any, batch: Batch, prompts: Prompts, seed: int, ramp: float) -> dict[str, Tensor]:
    """The weighted terms of the loss for one batch; their sum is minimised."""
    rng = np.random.Generator(np.random.PCG64([seed, batch.step, 1]))
    shares, visual = batch.shares, model.visual
    weight = balance(shares)
    with torch.autocast("cpu", torch.bfloat16):
        text = readouts.encode_text(model, *prompts.batch(prompts.classes(rng)))
        text = F.normalize(text + readouts.encode_text(model, *prompts.batch(prompts.classes(rng))), dim=-1)
        captions = readouts.encode_text(model, *prompts.batch(prompts.captions(rng, shares)))
        feats = readouts.visual_tokens(visual, normalise_images(batch.images), batch.corner)
        deep = feats[-2]
        # SC-CLIP adds CLS to the patches: the head must not be swamped by it.
        added = float(rng.uniform(0.0, 0.6)) if rng.random() < 0.6 else 0.0
        rule = ("kk", "kk", "qq", "qqkk")[int(rng.integers(4))]
        heads = {
            "value": (1.0, readouts.value_only(visual, deep[:, 1:])),
            "self": (0.6, readouts.self_self(visual, deep[:, 1:], rule) + added * deep[:, :1]),
            "sc": (1.5, readouts.sc(visual, feats)),
            "deeper": (0.3, readouts.value_only(visual, feats[int(rng.integers(5, 10))][:, 1:])),
            "vanilla": (VANILLA_WEIGHT, feats[-1][:, 1:]),
        }
        embedded = {name: readouts.project(visual, x) for name, (_, x) in heads.items()}
        image = readouts.project(visual, feats[-1][:, 0])
    mix = shares.mean(1, keepdim=True)
    blurred = (1.0 - VANILLA_BLUR) * shares + VANILLA_BLUR * mix
    terms = {
        name: share * soft_cross_entropy(embedded[name], text, blurred if name == "vanilla" else shares, weight)
        for name, (share, _) in heads.items()
    }
    pairs = SCALE * image @ captions.T
    own = torch.arange(len(pairs))
    terms["caption"] = 0.25 * (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own))
    seen = mix[:, 0].sqrt() * (mix[:, 0] > 0.01)
    terms["image"] = 0.3 * soft_cross_entropy(
        image[:, None], text, (seen / seen.sum(-1, keepdim=True))[:, None], torch.ones(len(image), 1)
    )
    terms["separation"] = ramp * (separation(feats[3][:, 1:], shares) + separation(feats[8][:, 1:], shares))
    return terms


class Schedule:
    """Learning rate by step: warm-up, cosine to zero, or a straight fall to zero once ``cool`` was called."""

    def __init__(self, peak: float, steps: int, cooldown: int, cooling: int | None = None) -> None:
        self.peak, self.steps, self.cooldown, self.cooling = peak, steps, cooldown, cooling

    def _cosine(self, step: int) -> float:
        return self.peak * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def rate(self, step: int) -> float:
        if self.cooling is None:
            return self._cosine(step)
        return min(self._cosine(step), self._cosine(self.cooling) * (1 - (step - self.cooling) / self.cooldown))

    def cool(self, step: int) -> None:
        if self.cooling is None:
            self.cooling = step

    def end(self) -> int:
        return self.steps if self.cooling is None else min(self.steps, self.cooling + self.cooldown)


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    torch.save(state, partial)
    os.replace(partial, path)


def _parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    rest = [p for n, p in model.named_parameters() if (p.ndim < 2 or "embedding" in n) and n != "logit_scale"]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]


def train(
    out: Path,
    steps: int,
    minutes: float,
    seed: int,
    peak: float,
    cooldown: int,
    threads: int,
    cool_at: int | None = None,
) -> Path:
    """Trains or resumes, returns the checkpoint's path.

    Args:
        out: Folder for ``checkpoint.pt`` and ``log.jsonl``.
        steps: Length of the cosine schedule.
        minutes: Time after which the cool-down starts if it has not; 0 for none.
        seed: Of initialisation, scenes and prompts.
        peak: Highest learning rate.
        cooldown: Steps of an early end.
        threads: CPU threads for the network; one more process draws the scenes.
        cool_at: Step at which the cool-down starts, to repeat a run that ended early.
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.pt"
    prompts = Prompts()
    model: Any = readouts.small_clip(len(prompts.rows), seed)
    model.logit_scale.data.fill_(math.log(SCALE))
    model.logit_scale.requires_grad_(False)
    optimiser = torch.optim.AdamW(_parameter_groups(model), lr=peak, betas=(0.9, 0.98))
    start, spent, schedule = 0, 0.0, Schedule(peak, steps, cooldown)
    recent: dict[str, float] = {}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        start, spent, recent = saved["step"], saved["seconds"], saved["loss"]
        schedule.cooling = saved["cooling"]

    stop: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.append(number)

    signal.signal(signal.SIGUSR1, on_signal)
    began = saved_at = time.monotonic()

    def checkpoint(step: int) -> None:
        seconds = spent + time.monotonic() - began
        _save(
            path,
            {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "seconds": seconds,
                "cooling": schedule.cooling,
                "loss": recent,
                "rows": prompts.rows,
                "seed": seed,
                "schedule_steps": steps,
                "peak": peak,
                "torch": str(torch.__version__),
            },
        )

    data = Subset(Scenes(steps, seed), range(start, steps))
    loader = DataLoader(data, batch_size=None, shuffle=False, num_workers=1, prefetch_factor=4)
    step = start
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        for batch in loader:
            step = batch.step
            if stop or step == cool_at or (minutes and spent + time.monotonic() - began > 60 * minutes):
                schedule.cool(step)
            if step >= schedule.end():
                break
            rate = schedule.rate(step)
            for group in optimiser.param_groups:
                group["lr"] = rate
            terms = losses(model, batch, prompts, seed, ramp=min(1.0, max(0.0, step / steps - 0.03) / 0.2))
            total = torch.stack(list(terms.values())).sum()
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            for name, term in [*terms.items(), ("total", total)]:
                value = float(term.detach())
                recent[name] = 0.97 * recent.get(name, value) + 0.03 * value
            step += 1
            if step % 50 == 0:
                seconds = spent + time.monotonic() - began
                row = {"step": step, "lr": rate, "seconds": round(seconds, 1)}
                log.write(json.dumps(row | {k: round(v, 4) for k, v in recent.items()}) + "\n")
                log.flush()
            if time.monotonic() - saved_at > 150:
                checkpoint(step)
                saved_at = time.monotonic()
    checkpoint(step)
    return path


def main(argv: list[str] | None = None) -> int:
    """Train, export or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the run: checkpoint.pt, log.jsonl; resumed when it exists")
    parser.add_argument("--steps", type=int, default=8000, help="length of the schedule")
    parser.add_argument("--minutes", type=float, default=0.0, help="start the cool-down after this time")
    parser.add_argument("--cooldown", type=int, default=600, help="steps of an early end")
    parser.add_argument("--cool-at", type=int, metavar="STEP", help="start the cool-down at this step")
    parser.add_argument("--seed", type=int, default=7, help="0 to 255")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export", type=Path, help="write the checkpoint in --out as the weight file that ships")
    parser.add_argument("--evaluate", action="store_true", help="mIoU of the shipped weights on held-out scenes")
    parser.add_argument("--images", type=int, default=24, help="scenes per benchmark for --evaluate")
    parser.add_argument("--weights", type=Path, help="weight file for --evaluate instead of the shipped one")
    options = parser.parse_args(argv)
    if options.evaluate:
        from ovbench.networks.builtin.evaluation import report

        torch.set_num_threads(options.threads)
        sys.stdout.write(report(options.weights, options.images))
        return 0
    if options.out is None:
        parser.error("--out is needed to train or export")
    if options.export is None:
        train(
            options.out,
            options.steps,
            options.minutes,
            options.seed,
            options.lr,
            options.cooldown,
            options.threads,
            options.cool_at,
        )
    else:
        from ovbench.networks.builtin.weights import export

        export(options.out / "checkpoint.pt", options.export)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
