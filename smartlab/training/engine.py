"""One loop for everything that is trained, on one CPU or many nodes, that loses nothing.

- Everything random in step t follows from (seed, t): masks, noise, crops, augmentation, stochastic depth.
  The schedules follow from t, the loader's order from (seed, epoch). So a checkpoint holds the `parts` of a
  run and no generator, and resuming gives the losses of never having stopped.
- accelerate places the network (CPU, GPU, DDP, FSDP) and the precision; nothing here asks where it runs.
- SIGTERM (and Ctrl-C) saves after the current step and returns; SIGUSR1 saves and goes on.
- A step whose loss or gradient is not finite is never taken.

Pretraining and fine-tuning are its two users: what they compute stands in `training/pretrain.py` and in
`evaluation/finetune/trainer.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from smartlab.core.errors import UseError
from smartlab.core.settings import TrainConfig
from smartlab.data.crops.loader import CropLoader, GivenUp
from smartlab.methods.distillation import mean_over_ranks
from smartlab.training import checkpoint
from smartlab.training.requests import Requests, from_main
from smartlab.training.setup import compiled, keep_freed_memory
from smartlab.training.sharding import gathered, scattered, shard

if TYPE_CHECKING:
    from accelerate import Accelerator


class Part(NamedTuple):
    """Something with a state that outlives the process."""

    save: Callable[[], Any]
    load: Callable[[Any], Any]


class Engine:
    """One run. A subclass says what a step computes, by the methods under "what is trained"."""

    loader: CropLoader
    network: Any  # what is trained, whose weights are saved
    model: Any  # the same as accelerate has placed it: a step goes through this
    optimiser: Any
    header: dict[str, str]

    def __init__(self, out: Path, train: TrainConfig, seed: int, accelerator: Accelerator) -> None:
        self.out, self.train, self.seed, self.accelerator = out, train, seed, accelerator
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.sharded = train.sharding == "fsdp" and self.world > 1
        self.step, self.done, self.bad_in_a_row = 0, False, 0
        self.parts: dict[str, Part] = {}
        self.weights: dict[str, Tensor] | None = None  # and the rest of the checkpoint it begins with
        self.state: dict[str, Any] = {}
        self.damaged: list[Path] = []  # newer ones, which cannot be read
        self.ends = ExitStack()

    # ---- from the folder to the first step, in this order

    def find(self, header: dict[str, str], *, allow_changes: bool, fix: str, older: str = "") -> None:
        """The newest whole checkpoint, if there is one, must be of the same settings and data.

        header: what a resumed run has to have in common. older: how runs of 0.1 noted the same data.
        """
        self.header = header
        if not from_main(bool(checkpoint.steps(self.out))):
            return
        if self.main:
            self.weights, self.state, self.damaged = checkpoint.newest_whole(self.out)
        step, self.damaged = from_main((int(self.state.get("step", 0)), self.damaged))
        if not self.main:
            self.weights, self.state = checkpoint.load(checkpoint.folder(self.out, step))
        if self.state["header"]["data"] == older:
            self.state["header"]["data"] = header["data"]
        if (changed := checkpoint.differences(self.state["header"], header)) and not allow_changes:
            problem = "cannot resume: the settings or the data changed since"
            raise UseError(problem, path=self.out, found="; ".join(changed), fix=fix)

    def place(
        self,
        network: nn.Module,
        loader: CropLoader,
        groups: Callable[[nn.Module], list[dict[str, Any]]],
        parts: dict[str, Part],
        through: nn.Module | None = None,
    ) -> None:
        """Put all in its place, as it was saved.

        groups: of the network's parameters, for the optimiser. parts: what else a checkpoint holds, by its name
        there. through: what a step goes through, if that is not the network itself.
        """
        self.network, self.loader = network, loader
        if self.weights is not None:
            network.load_state_dict(self.weights)
        network.to(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        model: nn.Module = shard(network) if self.sharded else through or network  # type: ignore[assignment]
        model = compiled(model) if self.train.compile else model
        self.model = model if self.sharded else self.accelerator.prepare(model)
        optimiser = torch.optim.AdamW(groups(network), lr=self.train.lr, fused=True)
        self.optimiser = self.accelerator.prepare(optimiser)
        self.parts = {"loader": Part(loader.state_dict, loader.load_state_dict), **parts}
        self.parts["optimiser"] = Part(lambda: gathered(self.optimiser.state_dict()), self._load_optimiser)
        if (scaler := self.accelerator.scaler) is not None:
            self.parts["scaler"] = Part(scaler.state_dict, scaler.load_state_dict)
        self._restore()
        self.batches = self._endless()
        loader.stopped = lambda: self.requests.asked == "stop"

    def _restore(self) -> None:
        for name, part in self.parts.items():
            if name in self.state:
                part.load(self.state[name])
        self.step, self.weights, self.state = self.state.get("step", 0), None, {}
        self.done = self.done or self.step >= self.train.steps
        if self.damaged and self.main:
            checkpoint.set_aside(self.damaged)
            print(f"{self.out}: {self.damage()}", file=sys.stderr)

    def damage(self) -> str:
        """What is said of checkpoints that could not be read."""
        names = ", ".join(path.name for path in self.damaged)
        return f"{names} cannot be read and was set aside: the run goes on from step {self.step}"

    # ---- the loop

    def run(self) -> bool:
        """Steps from where it stands; whether to the end: else it was asked to stop, and has saved itself."""
        self.requests = Requests(self.device, self.world)
        self.ends.callback(self.requests.close)
        while not self.done:
            try:
                metrics = self.one_step()
            except GivenUp:
                if self.world > 1 or any(p.grad is not None for p in self.trained()):  # the step had begun
                    raise
                self.save()
                return False
            self.step += 1
            self.done = self.step == self.train.steps
            self.after_step(metrics)
            request = self.requests.agreed()
            if self.done or request or self.step % self.train.checkpoint_every == 0:
                self.save()
            if request == "stop" and not self.done:
                return False
        return True

    def one_step(self) -> dict[str, Any]:
        """Forward and backward over the micro-batches, then the optimiser, then what follows it."""
        self.model.train()
        self.before_step()
        totals: dict[str, Any] = {}
        drawn: list[tuple[Any, Tensor]] = []  # images and loss of every micro-batch, for blame
        for micro in range(self.train.accumulate):
            batch = next(self.batches)
            last = micro == self.train.accumulate - 1
            if self.sharded:
                self.network.set_requires_gradient_sync(last)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, metrics = self.loss(batch, micro)
                self.accelerator.backward(loss / self.train.accumulate)
            drawn.append((batch.get("image"), loss.detach()))
            for name, value in (metrics | {"loss": loss.detach()}).items():
                totals[name] = totals.get(name, 0.0) + value / self.train.accumulate
        totals |= self.before_update()
        norm = gathered(self.accelerator.clip_grad_norm_(self.trained(), self.train.clip))
        # one infinite gradient would make every weight NaN through clipping, whatever the loss
        finite = bool(torch.isfinite(mean_over_ranks(totals["loss"])) & torch.isfinite(norm))
        if finite or self.accelerator.scaler is not None:  # fp16: the scaler skips by itself, and learns
            self.optimiser.step()
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.after_update() if finite else self.not_finite(drawn)
        self.optimiser.zero_grad(set_to_none=True)
        return totals | {"grad_norm": norm}

    def save(self) -> None:
        """Write a whole checkpoint of the current step."""
        state = {name: part.save() for name, part in self.parts.items()}
        weights = gathered(self.network.state_dict())
        if self.main:
            checkpoint.save(self.out, self.step, weights, state, self.header)
            checkpoint.prune(self.out, self.train.keep_last, self.train.keep_every)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.ends.close()
        self.batches.close()
        self.loader.close()

    # ---- what is trained

    def before_step(self) -> None:
        """Set learning rates, and what stands still in this step; the model is in training mode."""

    def loss(self, batch: dict[str, Any], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch through `self.model`, and what is to be told of it."""
        raise NotImplementedError

    def before_update(self) -> dict[str, Any]:
        """Look at the gradients, change them; returns what is to be told."""
        return {}

    def after_update(self) -> None:
        """Follow the weights that have just changed."""

    def not_finite(self, drawn: list[tuple[Any, Tensor]]) -> None:
        """The step was not taken. drawn: images and loss of its micro-batches."""

    def after_step(self, metrics: dict[str, Any]) -> None:
        """Tell of the step that was just made; may say that it was the last one, by `done`."""

    # ---- parts

    def keeps(self, *names: str) -> dict[str, Part]:
        """Attributes of this object, as parts."""
        return {name: Part(partial(getattr, self, name), partial(setattr, self, name)) for name in names}

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def _load_optimiser(self, state: dict[str, Any]) -> None:
        held = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.optimiser.load_state_dict(scattered(state, held))

    def _endless(self) -> Generator[dict[str, Any], None, None]:
        while True:
            yield from self.loader


def refuse_run(out: Path, resume: bool, what: str) -> None:
    """A folder that holds a run is only written to by who says so."""
    if checkpoint.steps(out) and not resume:
        fix = "resume it with resume=True (--resume), or choose another folder"
        raise UseError(f"the folder holds a {what} already", path=out, fix=fix)


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbours give unrelated seeds."""
    value = 0
    for number in numbers:
        value = (value ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 31
    return value >> 1
