"""How a network is fine-tuned, through the one loop of training (`training/engine.py`), which loses nothing.

- A pretrained encoder is changed with care: it stands still in the first steps, until the new head
  asks for something sensible, and its early layers learn more slowly than its late ones (layer-wise
  decay; Bao et al., "BEiT", 2021).
- The weights that are kept are those with the best score on the validation patients; without such
  patients the last ones. The loop stops when the score has not improved for `patience` looks.
- Several processes share every batch, and the scans to predict. Each validates on all patients, and the first one's
  score counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from smartlab.core.errors import DataError
from smartlab.core.files import write_text
from smartlab.data.crops.loader import CropLoader
from smartlab.data.crops.views import CropDataset
from smartlab.evaluation.features.encoders import as_encoder, identity
from smartlab.evaluation.finetune.layers import layer_groups
from smartlab.evaluation.finetune.settings import Mode, Settings
from smartlab.evaluation.learn.folds import deal
from smartlab.methods.distillation import mean_over_ranks
from smartlab.training import schedules
from smartlab.training.engine import Engine, mix, refuse_run
from smartlab.training.requests import from_main, only_one
from smartlab.training.setup import make_accelerator

if TYPE_CHECKING:
    import pandas as pd
    from accelerate import Accelerator

    from smartlab.data.store.store import Store

Loss = Callable[[dict[str, Any], torch.Generator], Tensor]


class Stopped(SystemExit):
    """The run was asked to stop, and saved itself. Uncaught, the process ends with exit code 0."""

    def __init__(self, out: Path, step: int) -> None:
        super().__init__(0)
        self.out, self.step = out, step


class Fitted(NamedTuple):
    """What `fit` did; the model holds the kept weights, ready for use."""

    history: pd.DataFrame  # one row per step: step, lr, loss, score (where it was looked at)
    step: int  # whose weights are kept
    score: float  # of these weights; not a number without validation patients


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is trained, on what, and how it is judged on the way.

    data:     the items of all steps in order (`Settings.items`).
    loss:     (batch on the device, generator for augmentation) -> scalar.
    mode:     "full" trains everything, "frozen" all but the encoder; "scratch" is for an encoder that
              was not pretrained: everything from the first step, at one learning rate.
    encoder:  prefix of the encoder's parameters in `model`, e.g. "swinViT.".
    facts:    what else the result depends on, besides settings: resuming with others is refused.
    validate: a score, higher is better, of the model as it is (in eval mode).
    """

    model: nn.Module
    data: CropDataset
    loss: Loss
    mode: Mode
    encoder: str
    facts: dict[str, Any]
    validate: Callable[[], float] | None = None


def fit(
    lesson: Lesson, out: Path, settings: Settings, *, seed: int, resume: bool = False, progress: bool = True
) -> Fitted:
    """Train the lesson's model, in the folder `out`."""
    with only_one(out):
        refuse_run(out, resume, "fine-tuning")
        tuning = FineTuning(lesson, out, settings, seed, progress)
        try:
            if not tuning.run():
                raise Stopped(out, tuning.step)
        finally:
            tuning.close()
    return tuning.fitted()


@dataclass(frozen=True, kw_only=True)
class Call:
    """What all trainings of one call share."""

    encoder: Any
    store: Store
    out: Path
    size: int  # of the crops
    seed: int
    settings: Settings
    resume: bool
    progress: bool

    def fit(self, name: str, lesson: Lesson) -> Fitted:
        """One of them, in the folder `name`."""
        known = {"data": self.store.fingerprint, "encoder": identity(self.encoder)[:16], "size": self.size}
        lesson, out = replace(lesson, facts=known | lesson.facts), self.out / name
        return fit(lesson, out, self.settings, seed=self.seed, resume=self.resume, progress=self.progress)

    def told(self, crops: dict[str, Any]) -> dict[str, Any]:
        """What a reader needs to believe the numbers."""
        return {
            **as_encoder(self.encoder)[1],
            "data": self.store.fingerprint,
            "seed": self.seed,
            "settings": {"size": self.size} | crops | self.settings.model_dump(),
        }


class Learner(nn.Module):
    """A network and its loss as one module, which is what several processes can share."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        return self.loss(batch, generator)


class FineTuning(Engine):
    """The state of one fine-tuning. `fit` is its only user."""

    def __init__(self, lesson: Lesson, out: Path, settings: Settings, seed: int, progress: bool) -> None:
        super().__init__(out, settings.train, seed, accelerator_of(settings))
        self.settings, self.mode, self.validate = settings, lesson.mode, lesson.validate
        self.encoder = lesson.model.get_submodule(lesson.encoder.rstrip("."))
        self.best_step, self.best_score, self.best = 0, -math.inf, dict[str, Tensor]()
        self.history: list[list[float]] = []
        kept = settings.model_dump(exclude={"workers", "device"})
        told = {"train": kept, "task": lesson.facts | {"mode": lesson.mode, "seed": seed}}
        header = {"config": json.dumps(told), "data": str(lesson.facts.get("data", ""))}
        self.find(header, allow_changes=False, fix="use the old settings, or another folder")
        batch, shard = settings.batch, {"rank": self.rank, "world": self.world}
        loader = CropLoader(lesson.data, batch, workers=settings.workers, seed=seed, shuffle=False, **shard)
        if self.state:  # runs of 0.1 did not note where the loader was
            self.state.setdefault("loader", loader.state_dict() | {"position": self.state["step"]})
        decay = settings.layer_decay if lesson.mode == "full" else 1.0
        parts = self.keeps("history", "best", "best_step", "best_score", "done")
        groups = partial(layer_groups, encoder=lesson.encoder, decay=decay)
        self.place(lesson.model, loader, groups, parts, Learner(lesson.model, lesson.loss))
        self.bar = tqdm(
            total=self.train.steps,
            initial=self.step,
            desc=self.out.name,
            unit="step",
            mininterval=1.0,
            disable=not (progress and self.main) or self.done,
        )

    # ---- what is trained

    def before_step(self) -> None:
        """Learning rates, the encoder's by its layers; in its first steps, or always, it stands still."""
        s, step = self.settings, self.step
        self.lr = schedules.learning_rate(step, self.train, 1)
        alone = round(s.head_only * s.steps) if self.mode == "full" else 0  # steps of the head
        # the encoder joins gently: its first steps, of an optimiser without a memory, are its coarsest
        ramp = min(1.0, (step - alone + 1) / max(1, round(s.warmup * s.steps))) if alone else 1.0
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * group["scale"] * (ramp if group["encoder"] else 1.0)
            group["weight_decay"] = s.weight_decay * group["decays"]
        still = self.mode == "frozen" or step < alone
        self.encoder.requires_grad_(not still)
        self.encoder.train(not still)

    def loss(self, batch: dict[str, Any], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        own = (2, micro, self.rank) if micro or self.rank else ()  # runs of 0.1 had one batch in one process
        torch.manual_seed(mix(self.seed, self.step, *own))
        generator = torch.Generator().manual_seed(mix(self.seed, self.step, 1, *([micro] if micro else [])))
        on_device = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with self.accelerator.autocast():
            return self.model(on_device, generator), {}

    def not_finite(self, drawn: list[tuple[Any, Tensor]]) -> None:
        raise DataError(
            "the loss or its gradient is no longer a number",
            path=self.out,
            found=f"step {self.step + 1}, learning rate {self.lr:.2g}, precision {self.settings.precision}",
            fix="lower lr, or use precision=fp32",
        )

    # ---- what is told

    def after_step(self, metrics: dict[str, Any]) -> None:
        """A row of the history; a look at the validation score where it is due."""
        due = self.step % self.settings.validate_every == 0 or self.step == self.train.steps
        score = self._look() if self.validate and due else math.nan
        self.best_step = self.best_step if self.validate else self.step
        value = float(mean_over_ranks(metrics["loss"]))
        self.history.append([self.step, self.lr, value, score])
        self.bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        self.bar.update()

    @torch.no_grad()
    def _look(self) -> float:
        """Score the model; keep its weights if it is the best so far, stop after too many that are not."""
        assert self.validate is not None
        self.network.eval()
        score = from_main(float(self.validate()))
        if score > self.best_score:
            self.best_score, self.best_step = score, self.step
            self.best = {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
        self.done |= self.step - self.best_step >= self.settings.patience * self.settings.validate_every
        return score

    def save(self) -> None:
        """And the history, for people to look at."""
        super().save()
        if self.main:
            write_text(self.out / "history.csv", self._table().to_csv(index=False))

    def fitted(self) -> Fitted:
        """Leave the kept weights in the model."""
        if self.best:
            self.network.load_state_dict(self.best)
        self.network.eval()
        return Fitted(self._table(), self.best_step, self.best_score if self.best else math.nan)

    def _table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.history, columns=["step", "lr", "loss", "score"]).astype({"step": int})

    def close(self) -> None:
        super().close()
        self.bar.close()


HELD_OUT = 7  # one training patient in seven chooses the weights, where the data name no validation patients


def hold_out(
    patients: np.ndarray, y: np.ndarray, train: np.ndarray, split: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training rows -> (rows to learn from, rows that choose when to stop), by patient.

    The second are those of the official split "val" where there are any, else one patient in seven;
    none with fewer than seven patients, who are then all learned from.
    """
    val = split[train] == "val"
    if not val.any() and len(set(patients[train])) >= HELD_OUT:
        val = deal(patients[train], y[train], HELD_OUT, seed) == 0
    return (train, train[:0]) if val.all() else (train[~val], train[val])


def device_of(settings: Settings) -> torch.device:
    return accelerator_of(settings).device


def accelerator_of(settings: Settings) -> Accelerator:
    """The encoder may stand still, and parts of it may serve pretraining only: gradients of all are never there."""
    device = settings.device or (None if torch.cuda.is_available() else "cpu")
    return make_accelerator(settings.precision, idle=True, device=device)
