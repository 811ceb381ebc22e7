"""Planted co-occurrence: do masks that hide whole objects teach what goes with what, where that is what there is to learn?

    python -m benchmarks.studies.planted                    # 4 arms × 3 seeds, 5 to 8 minutes each on one core
    python -m benchmarks.studies.planted --seeds 1 --steps 300

A view is noise with two objects side by side, each of 4×4×4 mask units; the brightness of one (four
classes, another order for each) determines the other's. Who sees one object can tell the other, and nothing else can. The arms
differ in masks alone, exactly 70% of the units each:

    random       at random: of an object some units are nearly always left
    oracle       one object whole, drawn anew for every view, the rest at random
    both         both objects whole: the other says nothing
    attention    attention_hint, as published, from the teacher's clean look

Judged on views never seen, with one object whole and most of the background hidden: which class does the network
paint at the hidden place (nearest brightness of the four)? Chance is 0.25.

Written down before it ran. Oracle beats both (which stays at chance) and random: only there must an object be told
from the other. Random lies below oracle: it never hides an object whole. If guided masks do what they are for they
lie above random. Primary: accuracy, attention minus random, over seeds; second: how much of the objects is hidden.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import smartlab as sl
from benchmarks.harness import machine
from smartlab.core.clock import Clock
from smartlab.core.places import code_version
from smartlab.evaluation.judge.result import clean
from smartlab.masking import hidden_count, upsample
from smartlab.methods.masked_distillation import MaskedDistillation
from smartlab.training.setup import parameter_groups

ARMS = ("random", "oracle", "both", "attention")
LEVELS = torch.tensor([0.25, 0.5, 0.75, 1.0])
APART, JITTER = 4, 0  # units from the first object to the second, in x; how far both move together
PARTNER = (2, 0, 3, 1)  # the class that goes with class 0, 1, 2, 3
UNIT, GRID, SIZE = 4, 8, 4  # voxels a unit, units a view, units an object
SETTINGS: dict[str, Any] = {
    "encoder.embed_dim": 12,
    "data.view": UNIT * GRID,
    "data.region": UNIT * GRID,
    "semantic.stage": 1,  # units of 4 voxels: 512 in a view
    "mask.warmup_epochs": 0,
    "mask.informativeness": 0,  # guided from the first step, as published
    "teacher.momentum": 0.99,
    "train.batch": 4,
    "train.lr": 2e-3,
}
RESULTS = Path(__file__).parents[1] / "results" / "planted.json"


class Scenes(NamedTuple):
    views: Tensor  # (B, 2, 1, D, H, W)
    objects: Tensor  # (2B, 2, units) bool: which units are the first, the second object
    classes: Tensor  # (2B, 2)


def scenes(batch: int, generator: torch.Generator) -> Scenes:
    """Two views of every scene: the same classes, elsewhere, with other noise."""
    rows = 2 * batch
    first = torch.randint(4, (batch,), generator=generator).repeat_interleave(2)
    classes = torch.stack([first, torch.tensor(PARTNER)[first]], 1)
    corner = torch.randint(0, 1 + JITTER, (rows, 3), generator=generator) + torch.tensor([2, 2, 0])
    views = 0.1 * torch.rand((rows, 1, *[UNIT * GRID] * 3), generator=generator)
    objects = torch.zeros(rows, 2, GRID, GRID, GRID, dtype=torch.bool)
    for row, (z, y, x) in enumerate(corner.tolist()):
        for which in range(2):
            at = x + APART * which
            objects[row, which, z : z + SIZE, y : y + SIZE, at : at + SIZE] = True
    for which in range(2):
        inside = upsample(objects[:, which].flatten(1), (GRID,) * 3, UNIT)[:, None]
        level = LEVELS[classes[:, which]].view(rows, 1, 1, 1, 1)
        views = torch.where(inside, level + 0.5 * (views - 0.05), views)
    return Scenes(views.view(batch, 2, 1, *views.shape[2:]), objects.flatten(2), classes)


class Told(MaskedDistillation):
    """The method with the truth at hand: `must` hides these units whole, the rest at random."""

    must: Tensor | None = None

    def choose(self, guide: Any, x: Tensor, clock: Clock, generator: torch.Generator) -> Tensor:
        if self.must is None:
            return super().choose(guide, x, clock, generator)
        return hide(self.must, self.config.mask.ratio, generator)


def hide(must: Tensor, ratio: float, generator: torch.Generator, never: Tensor | None = None) -> Tensor:
    """(B, N) hidden: what must be, and others at random up to the ratio; none of `never`."""
    score = torch.rand(must.shape, generator=generator) + 2.0 * must
    score = score if never is None else score - 4.0 * never
    return score.argsort(-1, descending=True).argsort(-1) < hidden_count(ratio, must.shape[1])


def train(
    arm: str, seed: int, steps: int, more: dict[str, Any] | None = None
) -> tuple[Told, dict[str, float]]:
    """One arm: the network and how its last fifth of training went."""
    strategy = "attention_hint" if arm == "attention" else "random"
    config = sl.load_config(
        "tiny", SETTINGS | {"mask.strategy": strategy, "train.steps": steps, "seed": seed} | (more or {})
    )
    torch.manual_seed(seed)
    method, generator = Told(config), torch.Generator().manual_seed(seed)
    method.train()
    optimiser = torch.optim.AdamW(parameter_groups(method), lr=config.train.lr, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.train.lr, steps, pct_start=0.1)
    seen: list[dict[str, float]] = []
    for step in range(steps):
        made = scenes(config.train.batch, generator)
        if arm in ("oracle", "both"):
            one = torch.randint(2, (len(made.classes), 1), generator=generator) == torch.arange(2)
            which = one if arm == "oracle" else torch.ones_like(one)
            method.must = (made.objects & which[..., None]).any(1)
        shares = {"object": made.objects.any(1).float()}
        clock = Clock(step, steps, steps)
        loss, metrics = method(made.views, clock, generator, shares)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        method.update_teacher(config.teacher.momentum)
        if step >= 0.8 * steps:
            told = metrics | method.told(clock, config.teacher.momentum)
            seen.append(
                {
                    k: float(v)
                    for k, v in told.items()
                    if k.startswith(("hidden_", "lift_", "loss_", "guided"))
                }
            )
    return method, {k: float(np.mean([s[k] for s in seen])) for k in seen[0]}


@torch.no_grad()
def judge(method: Told, seed: int, views: int = 256) -> dict[str, float]:
    """Accuracy of the class painted where an object is hidden, the other whole in sight; and beside it without the other."""
    method.eval()
    generator = torch.Generator().manual_seed(10_000 + seed)
    right: dict[str, list[Tensor]] = {"other seen": [], "other hidden": []}
    for _ in range(views // 8):
        made = scenes(4, generator)
        x = made.views.flatten(0, 1)
        one = torch.randint(2, (len(x),), generator=generator)
        rows = torch.arange(len(x))
        target, other = made.objects[rows, one], made.objects[rows, 1 - one]
        for name, hidden in {
            "other seen": hide(target, method.config.mask.ratio, generator, never=other),
            "other hidden": hide(target | other, method.config.mask.ratio, generator),
        }.items():
            painted = method.reconstruct(method.student.encoder(x, hidden=hidden).stages[-1])
            inside = upsample(target, (GRID,) * 3, UNIT)[:, None]
            level = (painted * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
            nearest = (level[:, None] - LEVELS).abs().argmin(1)
            right[name].append(nearest == made.classes[rows, one])
    return {name: float(torch.cat(found).float().mean()) for name, found in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    settings = SETTINGS | {"steps": asked.steps}
    report: dict[str, Any] = {"what": __doc__.split("\n\n")[0].strip(), "settings": settings, "arms": {}}  # type: ignore[union-attr]
    if (
        asked.json.is_file()
        and (there := json.loads(asked.json.read_text(encoding="utf-8")))["settings"] == settings
    ):
        report = there  # stopped, it goes on
    for seed in range(asked.seeds):
        for arm in asked.arms:
            done = report["arms"].setdefault(arm, {})
            if str(seed) in done:
                continue
            method, training = train(arm, seed, asked.steps)
            done[str(seed)] = {"accuracy": judge(method, seed), "training": training}
            print(arm, seed, done[str(seed)], flush=True)
            report |= {"machine": machine(), "code": code_version()}
            asked.json.write_text(json.dumps(clean(report), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
