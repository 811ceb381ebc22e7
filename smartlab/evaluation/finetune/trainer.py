"""One small loop for every fine-tuning task, that loses nothing.

- As in pretraining, everything random in step t follows from (seed, t): which crops, augmentation,
  stochastic depth. So a checkpoint holds weights, optimiser and history, and resuming a killed run
  gives what never stopping would have given. SIGTERM and Ctrl-C save after the current step.
- A pretrained encoder is changed with care: it stands still in the first steps, until the new head
  asks for something sensible, and its early layers learn more slowly than its late ones (layer-wise
  decay; Bao et al., "BEiT", 2021).
- The weights that are kept are those with the best score on the validation patients; without such
  patients the last ones. The loop stops when the score has not improved for `patience` looks.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from tqdm.auto import tqdm

from smartlab.core.config import TrainConfig
from smartlab.core.errors import DataError, UseError
from smartlab.core.files import write_text
from smartlab.data.crops.loader import CropLoader, GivenUp
from smartlab.data.crops.views import CropDataset
from smartlab.evaluation.learn.folds import deal
from smartlab.training import checkpoint, schedules
from smartlab.training.loop import mix
from smartlab.training.requests import Requests, only_one
from smartlab.training.setup import keep_freed_memory, parameter_groups

if TYPE_CHECKING:
    import pandas as pd

    from smartlab.evaluation.features.encoders import AnyEncoder

Mode = Literal["full", "frozen", "scratch"]
MODES: tuple[Mode, ...] = ("full", "frozen", "scratch")
_MERGING = 99  # after any block
Loss = Callable[[dict[str, Any], torch.Generator], Tensor]


class Settings(BaseModel):
    """How to fine-tune. Defaults suit a small network and tens of patients."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(300, ge=1)
    batch: int = Field(2, ge=1)
    lr: float = Field(1e-3, gt=0)  # of the head; the encoder's layers by layer_decay
    lr_end: float = Field(1e-6, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    layer_decay: float = Field(0.75, gt=0, le=1)  # learning rate of a layer over that of the next
    head_only: float = Field(0.1, ge=0, lt=1)  # share of the steps before the encoder is trained too
    weight_decay: float = Field(0.05, ge=0)
    clip: float = Field(1.0, gt=0)  # gradient norm
    validate_every: int = Field(50, ge=1)
    patience: int = Field(5, ge=1)  # looks at the validation score without a better one
    checkpoint_every: int = Field(50, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str | None = None  # None: the GPU where there is one
    workers: int = Field(0, ge=0)


def make_settings(**given: Any) -> Settings:
    """Settings from keywords; what is wrong with them is said at once."""
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UseError(
            f"fine-tuning setting {'.'.join(map(str, first['loc']))}: {first['msg']}",
            found=first["input"],
            expected=f"settings {', '.join(Settings.model_fields)}",
        ) from None


def check_modes(modes: Sequence[str], size: int, encoder: AnyEncoder) -> None:
    """Refuse unknown ways to start, and crops that the encoder cannot take."""
    if not modes or set(modes) - set(MODES) or len(set(modes)) < len(modes):
        raise UseError("unknown or repeated modes", found=list(modes), expected=f"some of {', '.join(MODES)}")
    stride = encoder.total
    if size % stride or size < stride:
        raise UseError(f"crops of {size} voxels", expected=f"a multiple of the encoder's stride {stride}")


def check_fractions(fractions: Sequence[float]) -> None:
    if not fractions or not all(0 < f <= 1 for f in fractions) or len(set(fractions)) < len(fractions):
        raise UseError(
            "fractions of the training patients", found=fractions, expected="each above 0, up to 1"
        )


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


def fit(
    model: nn.Module,
    data: CropDataset,
    loss: Loss,
    out: Path,
    settings: Settings,
    *,
    mode: Mode,
    encoder: str,
    seed: int,
    facts: dict[str, Any],
    validate: Callable[[], float] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Fitted:
    """Train `model` on `data`, whose items are those of all steps in order (steps × batch).

    loss:     (batch on the device, generator for augmentation) -> scalar.
    mode:     "full" trains everything, "frozen" all but the encoder; "scratch" is for an encoder that
              was not pretrained: everything from the first step, at one learning rate.
    encoder:  prefix of the encoder's parameters in `model`, e.g. "swinViT.".
    facts:    what else the result depends on, besides settings: resuming with others is refused.
    validate: a score, higher is better, of the model as it is (in eval mode).
    """
    with only_one(out):
        if checkpoint.steps(out) and not resume:
            raise UseError(
                "the folder holds a fine-tuning already",
                path=out,
                fix="resume it with resume=True (--resume), or choose another folder",
            )
        trainer = Trainer(model, data, loss, out, settings, mode, encoder, seed, facts, validate)
        try:
            return trainer.run(progress)
        finally:
            trainer.close()


class Trainer:
    """The state of one fine-tuning. `fit` is its only user."""

    def __init__(
        self,
        model: nn.Module,
        data: CropDataset,
        loss: Loss,
        out: Path,
        settings: Settings,
        mode: Mode,
        encoder: str,
        seed: int,
        facts: dict[str, Any],
        validate: Callable[[], float] | None,
    ) -> None:
        self.out, self.loss, self.validate, self.mode, self.seed = out, loss, validate, mode, seed
        self.settings = s = settings
        self.device = device_of(settings)
        self.model = model.to(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.encoder = model.get_submodule(encoder.rstrip("."))
        decay = s.layer_decay if mode == "full" else 1.0
        self.optimiser = torch.optim.AdamW(layer_groups(model, encoder, decay), lr=s.lr, fused=True)
        self.loader = CropLoader(data, s.batch, workers=s.workers, seed=seed, shuffle=False)
        self.schedule = TrainConfig(steps=s.steps, lr=s.lr, lr_end=s.lr_end, warmup=s.warmup)
        kept = settings.model_dump(exclude={"workers", "device"})
        self.header = {
            "config": json.dumps({"train": kept, "task": facts | {"mode": mode, "seed": seed}}),
            "data": str(facts.get("data", "")),
        }
        self.step, self.best_step, self.best_score, self.done = 0, 0, -math.inf, False
        self.best: dict[str, Tensor] = {}
        self.history: list[list[float]] = []
        if checkpoint.steps(out):
            self._load()
        self.requests = Requests(self.device, 1)
        self.loader.stopped = lambda: self.requests.asked == "stop"

    def run(self, progress: bool) -> Fitted:
        """From where we are to the end; leaves the kept weights in the model."""
        bar = tqdm(
            total=self.settings.steps,
            initial=self.step,
            desc=self.out.name,
            unit="step",
            mininterval=1.0,
            disable=not progress or self.done,
        )
        with bar:
            for batch in self._batches():
                bar.set_postfix(loss=f"{self.one_step(batch):.3f}", refresh=False)
                bar.update()
                request = self.requests.agreed()
                if self.done or request or self.step % self.settings.checkpoint_every == 0:
                    self.save()
                if request == "stop" and not self.done:
                    raise Stopped(self.out, self.step)
        if self.best:
            self.model.load_state_dict(self.best)
        self.model.eval()
        return Fitted(self._table(), self.best_step, self.best_score if self.best else math.nan)

    def one_step(self, batch: dict[str, Any]) -> float:
        """One update, and a look at the validation score where it is due."""
        s, step = self.settings, self.step
        lr = schedules.learning_rate(step, self.schedule, 1)
        alone = round(s.head_only * s.steps) if self.mode == "full" else 0  # steps of the head
        # the encoder joins gently: its first steps, of an optimiser without a memory, are its coarsest
        ramp = min(1.0, (step - alone + 1) / max(1, round(s.warmup * s.steps))) if alone else 1.0
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["scale"] * (ramp if group["encoder"] else 1.0)
            group["weight_decay"] = s.weight_decay * group["decays"]
        still = self.mode == "frozen" or step < alone
        self.encoder.requires_grad_(not still)
        self.model.train()
        self.encoder.train(not still)
        torch.manual_seed(mix(self.seed, step))
        generator = torch.Generator().manual_seed(mix(self.seed, step, 1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
            loss = self.loss(_on(batch, self.device), generator)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(
                "the loss is no longer a number",
                path=self.out,
                found=f"step {step + 1}, learning rate {lr:.2g}, precision {s.precision}",
                fix="lower lr, or use precision=fp32",
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], s.clip)
        self.optimiser.step()
        self.step += 1
        score = self._look() if self.validate and self._due() else math.nan
        self.history.append([self.step, lr, value, score])
        self.done = self.done or self.step == s.steps
        return value

    def _due(self) -> bool:
        return self.step % self.settings.validate_every == 0 or self.step == self.settings.steps

    @torch.no_grad()
    def _look(self) -> float:
        """Score the model; keep its weights if it is the best so far, stop after too many that are not."""
        assert self.validate is not None
        self.model.eval()
        score = float(self.validate())
        if score > self.best_score:
            self.best_score, self.best_step = score, self.step
            self.best = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        self.done = self.step - self.best_step >= self.settings.patience * self.settings.validate_every
        return score

    def save(self) -> None:
        """Write a whole checkpoint of the current step, and the history for people to look at."""
        if not self.validate:
            self.best_step = self.step
        state = {
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
            "best": self.best,
            "best_step": self.best_step,
            "best_score": self.best_score,
            "done": self.done,
        }
        checkpoint.save(self.out, self.step, self.model.state_dict(), state, self.header)
        checkpoint.prune(self.out, 2, None)
        write_text(self.out / "history.csv", self._table().to_csv(index=False))

    def close(self) -> None:
        self.requests.close()
        self.loader.close()

    def _load(self) -> None:
        weights, state, damaged = checkpoint.newest_whole(self.out)
        if changed := checkpoint.differences(state["header"], self.header):
            raise UseError(
                "cannot resume: the settings, the encoder or the data changed since",
                path=self.out,
                found="; ".join(changed),
                fix="use the old settings, or another folder",
            )
        self.model.load_state_dict(weights)
        self.optimiser.load_state_dict(state["optimiser"])
        self.loader.position = self.step = state["step"]
        self.best, self.best_step, self.best_score = state["best"], state["best_step"], state["best_score"]
        self.history, self.done = state["history"], state["done"]
        checkpoint.set_aside(damaged)
        if damaged:
            names = ", ".join(path.name for path in damaged)
            print(
                f"{self.out}: {names} cannot be read and was set aside: going on from step {self.step}",
                file=sys.stderr,
            )

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Those of the steps that are left."""
        if self.done:
            return
        try:
            for batch in self.loader:
                yield batch
                if self.done:
                    return
        except GivenUp:
            self.save()
            raise Stopped(self.out, self.step) from None

    def _table(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.history, columns=["step", "lr", "loss", "score"]).astype({"step": int})


def layer_groups(model: nn.Module, encoder: str, decay: float) -> list[dict[str, Any]]:
    """Parameter groups with "scale", the share of the learning rate: decay ** (layers above), and "encoder".

    The encoder's layers are its patch embedding, each Swin block, merging and semantic block; whatever is
    not the encoder's is on top of them, with scale 1.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    inside = [name for name in names.values() if name.startswith(encoder)]
    places = sorted({place_of(name.removeprefix(encoder)) for name in inside})
    depth = {name: places.index(place_of(name.removeprefix(encoder))) for name in inside}
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(model):
        by_layer: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_layer.setdefault(depth.get(names[id(parameter)], len(places)), []).append(parameter)
        groups += [
            {
                "params": parameters,
                "decays": group["decays"],
                "scale": decay ** (len(places) - layer),
                "encoder": layer < len(places),
            }
            for layer, parameters in sorted(by_layer.items())
        ]
    return groups


def place_of(name: str) -> tuple[int, int]:
    """(stage, block) of an encoder parameter, in order of depth; a stage's merging comes after its blocks.

    >>> place_of("swin.layers3.0.blocks.1.attn.qkv.weight"), place_of("patch_embed.proj.bias")
    ((3, 1), (0, 0))
    """
    if found := re.search(r"(?:^|\.)layers(\d)\.0\.(?:blocks\.(\d+)|downsample)\.", name):
        return int(found[1]), int(found[2]) if found[2] else _MERGING
    if found := re.search(r"(?:^|\.)semantic\.(?:blocks\.(\d+))?", name):
        return 5, int(found[1] or 0)
    if found := re.search(r"^blocks\.(\d+)\.", name):  # of a plain transformer
        return 1 + int(found[1]), 0
    if name.startswith("norm."):  # after its last block
        return _MERGING, 0
    return 0, 0


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


def weights_hash(model: nn.Module) -> str:
    """What tells one encoder from another: a hash of its weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def device_of(settings: Settings) -> torch.device:
    return torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
