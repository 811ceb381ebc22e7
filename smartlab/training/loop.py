"""One training loop for every method, on one CPU or many nodes, that loses nothing.

- Everything random in step t follows from (seed, t): masks, noise, augmentation, stochastic depth. The
  loader's order follows from (seed, epoch). So a checkpoint holds weights, optimiser and positions, and
  resuming gives the losses of never having stopped.
- accelerate places the model (CPU, GPU, DDP, FSDP) and the precision; nothing here asks where it runs.
- SIGTERM (and Ctrl-C) saves after the current step and returns; SIGUSR1 saves and goes on.
- A step with a non-finite loss is skipped, counted and written to events.jsonl with its images.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smartlab.core.clock import Clock
from smartlab.core.config import Config, load_config
from smartlab.core.errors import DataError, SmartlabError, UseError
from smartlab.core.files import write_text
from smartlab.data.cohort.manifest import load_manifest
from smartlab.data.crops.augment import window
from smartlab.data.crops.loader import CropLoader, GivenUp
from smartlab.data.store.prepare import locate_images, prepare_store
from smartlab.methods.distillation import mean_over_ranks
from smartlab.models.reach import reach
from smartlab.training import checkpoint, schedules
from smartlab.training.families import family_of
from smartlab.training.monitor import Monitor
from smartlab.training.requests import Requests, from_main, only_one
from smartlab.training.run import Run
from smartlab.training.setup import (
    compile_report,
    compiled,
    keep_freed_memory,
    make_accelerator,
    parameter_groups,
)
from smartlab.training.sharding import gathered, scattered, shard

if TYPE_CHECKING:
    from smartlab.data.store.store import Store


def pretrain(
    config: Config | str,
    out: str | Path,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    store: Store | None = None,
    progress: bool = True,
) -> Run:
    """Pretrain into the run folder `out`; works in a script, a notebook and under a launcher.

    resume:        go on from the newest checkpoint in `out` (start there if it has none).
    allow_changes: resume although the configuration or the data changed.
    store:         an open store; default: the one `config.data` describes, made if need be.

    >>> run = sl.pretrain("tiny", out="runs/a", resume=True)
    """
    config = config if isinstance(config, Config) else load_config(config)
    with only_one(Path(out)):
        trainer = Trainer(config, Path(out), resume, allow_changes, store, progress)
        try:
            trainer.run()
        finally:
            trainer.close()
    return Run(out)


class Trainer:
    """The state of one run. `pretrain` is its only user."""

    def __init__(
        self,
        config: Config,
        out: Path,
        resume: bool,
        allow_changes: bool,
        store: Store | None,
        progress: bool,
    ) -> None:
        self.config, self.out, self.family = config, out, family_of(config)
        self.device_run = accelerator = make_accelerator(config)
        self.main = accelerator.is_main_process
        there = checkpoint.steps(out)
        if there and not resume:
            raise UseError(
                "the folder holds a run already",
                path=out,
                fix="resume it with resume=True (--resume), or choose another folder",
            )
        self.places: dict[str, str | None] | None
        if store is None:
            with accelerator.main_process_first():
                located = locate_images(config.data, progress and self.main)
                _, store = prepare_store(config.data, progress and self.main, located)
            named, root = Path(config.data.manifest), located[1]
            self.places = {"manifest": str(named.absolute() if named.exists() else named)}
            self.places |= {"root": str(root.absolute()), "store": str(store.path)}
        else:  # of the configuration, as far as one can tell
            self.places = {} if _is_of(store, config.data.manifest) else None
        self.store = store
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.header = {"config": json.dumps(config.model_dump(mode="json")), "data": store.voxels}
        self.damaged: list[Path] = []
        weights, state = self._load(allow_changes) if from_main(bool(there)) else (None, None)
        self.images, held_out = self._training_images(state)
        self.loader = self._make_loader()
        per_epoch = config.train.steps_per_epoch or max(1, len(self.loader) // config.train.accumulate)
        torch.manual_seed(config.seed)
        self.method = self.family.method(config)
        self.per_epoch, self.step = per_epoch, state["step"] if state else 0
        if weights is not None:
            self.method.load_state_dict(weights)
        self.method.to(accelerator.device)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.sharded = config.train.sharding == "fsdp" and self.world > 1
        model: nn.Module = shard(self.method) if self.sharded else self.method  # type: ignore[assignment]
        self.model: Any = compiled(model) if config.train.compile else model
        if not self.sharded:
            self.model = accelerator.prepare(self.model)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.method), lr=config.train.lr, fused=True)
        self.optimiser = accelerator.prepare(self.optimiser)
        self.skipped, self.bad_in_a_row = 0, 0
        if state is not None:
            held = [p for group in self.optimiser.param_groups for p in group["params"]]
            self.optimiser.load_state_dict(scattered(state["optimiser"], held))
            self.loader.load_state_dict(state["loader"])
            self.skipped = int(state["skipped"])
            if accelerator.scaler is not None and "scaler" in state:
                accelerator.scaler.load_state_dict(state["scaler"])
        self._begin_folder()
        self.monitor = Monitor(out, config, self.main, progress and self.main, self.step)
        self.monitor.event(
            "resume" if state else "start", step=self.step, images=len(store), processes=self.world
        )
        if self.damaged:
            names = [path.name for path in self.damaged]
            text = (
                f"{', '.join(names)} cannot be read and was set aside: the run goes on from step {self.step}"
            )
            self.monitor.event("damaged checkpoint", text=text, checkpoints=names)
            if self.main:
                print(f"{self.out}: {text}", file=sys.stderr)
        if held_out:
            text = "the split changed since: the run goes on with the images it began with"
            self.monitor.event("split", text=text, images=len(self.images), now_held_out=held_out)
            if self.main:
                print(f"{text}; {held_out} of them are held out by now", file=sys.stderr)
        self._batches = self._endless()
        self.requests = Requests(accelerator.device, self.world)
        self.loader.stopped = lambda: self.requests.asked == "stop"

    # ---- the loop

    def run(self) -> None:
        """Steps from where we are to the end, saving and logging on the way."""
        train, began, seen, waited = self.config.train, time.monotonic(), 0, self.loader.wait_seconds
        first = self.step
        while self.step < train.steps:
            try:
                metrics = self.one_step()
            except GivenUp:
                if self.world > 1 or any(p.grad is not None for p in self._trained()):  # the step had begun
                    raise
                return self._stop()
            self.step += 1
            if train.compile and self.step == first + 1:
                self.monitor.event("compiled", seconds=round(time.monotonic() - began, 1), **compile_report())
            seen += self.family.views * train.batch * train.accumulate * self.world
            if self._logs(self.step):
                elapsed = max(time.monotonic() - began, 1e-9)
                metrics |= {
                    "views_per_second": seen / elapsed,
                    "data_wait": (self.loader.wait_seconds - waited) / elapsed,
                    "peak_memory_mb": peak_memory_mb(self.device_run.device),
                }
                self.monitor.row(self._scalars(metrics))
                began, seen, waited = time.monotonic(), 0, self.loader.wait_seconds
            if self.monitor.enabled:
                self.monitor.tick(float(metrics["loss"]))
            if (
                self.main
                and not self.sharded
                and (self.step % train.picture_every == 0 or self.step == train.steps)
            ):
                self._picture()
            request = self.requests.agreed()
            if request == "stop":
                return self._stop()
            if self.step % train.checkpoint_every == 0 or self.step == train.steps or request:
                self.save()
        self.monitor.finish(self.step)

    def _stop(self) -> None:
        self.save()
        self.monitor.event("stopped", step=self.step)

    def one_step(self) -> dict[str, Any]:
        """Forward and backward over the micro-batches, then the optimiser, then the teacher."""
        train, step = self.config.train, self.step
        lr = schedules.learning_rate(step, train, train.batch * train.accumulate * self.world)
        decay = schedules.weight_decay(step, train)
        momentum = schedules.momentum(step, train, self.config.teacher)
        for group in self.optimiser.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decays"] else 0.0
        self.model.train()
        totals: dict[str, Tensor] = {}
        drawn: list[tuple[list[int], Tensor]] = []  # images and loss of every micro-batch, for blame
        for micro in range(train.accumulate):
            batch = next(self._batches)
            generator = torch.Generator().manual_seed(mix(self.config.seed, step, micro))
            torch.manual_seed(mix(self.config.seed, step, micro, self.rank))
            views, shares = self.family.prepare(
                batch,
                self.config,
                self.device_run.device,
                generator,
                (self.rank, self.world),
                self.store.label_names if self._logs(step + 1) else None,
            )
            clock = Clock(step, train.steps, self.per_epoch, self.rank, self.world)
            last = micro == train.accumulate - 1
            if self.sharded:
                self.method.set_requires_gradient_sync(last)  # type: ignore[operator]
            with nullcontext() if last else self.device_run.no_sync(self.model):
                with self.device_run.autocast():
                    loss, metrics = self.model(views, clock, generator, shares)
                self.device_run.backward(loss / train.accumulate)
            drawn.append(([int(i) for i in batch["image"]], loss.detach()))
            for name, value in (metrics | {"loss": loss.detach()}).items():
                totals[name] = totals.get(name, 0.0) + value / train.accumulate
        if self._logs(step + 1) and not self.sharded:
            totals |= self._reach(views)
        self._freeze(clock)
        norm = gathered(self.device_run.clip_grad_norm_(self._trained(), train.clip))
        # one infinite gradient would make every weight NaN through clipping, whatever the loss
        finite = bool(torch.isfinite(mean_over_ranks(totals["loss"])) & torch.isfinite(norm))
        if finite or self.device_run.scaler is not None:  # fp16: the scaler skips by itself, and learns
            self.optimiser.step()
        if finite:
            self.method.update_teacher(momentum)
            self.bad_in_a_row = 0
        else:
            self._skip(drawn)
        self.optimiser.zero_grad(set_to_none=True)
        return totals | {
            "grad_norm": norm,
            "step": step + 1,
            "epoch": clock.epoch,
            "lr": lr,
            "weight_decay": decay,
            "skipped": self.skipped,
            **self.method.told(clock, momentum),
        }

    def _logs(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step in (1, self.config.train.steps)

    def save(self) -> None:
        """Write a whole checkpoint of the current step."""
        state = {
            "optimiser": gathered(self.optimiser.state_dict()),
            "loader": self.loader.state_dict(),
            "skipped": self.skipped,
            "images": self.images,
        }
        if self.device_run.scaler is not None:
            state["scaler"] = self.device_run.scaler.state_dict()
        weights = gathered(self.method.state_dict())
        if self.main:
            checkpoint.save(self.out, self.step, weights, state, self.header)
            checkpoint.prune(self.out, self.config.train.keep_last, self.config.train.keep_every)
            self.monitor.event("saved", step=self.step)
        self.device_run.wait_for_everyone()

    def close(self) -> None:
        self.requests.close()
        self._batches.close()  # type: ignore[attr-defined]
        self.loader.close()
        self.monitor.close()

    # ---- parts

    def _training_images(self, state: dict[str, Any] | None) -> tuple[list[int], int]:
        """Positions in the store of the images to train on, and how many of a run's own are no longer among them."""
        cases = self.store.cases
        now = sorted({int(i) for i in cases.image[(cases.split == "train") | cases.split.isna()]})
        if state is None or state["header"]["data"] != self.header["data"] or "images" not in state:
            return now, 0
        return state["images"], len({*state["images"]} - {*now})

    def _make_loader(self) -> CropLoader:
        train = self.config.train
        least = train.batch * self.world * train.accumulate
        return CropLoader(
            self.family.dataset(self.store, self.config, self.images, least),
            train.batch,
            workers=self.config.data.workers,
            seed=self.config.seed,
            rank=self.rank,
            world=self.world,
        )

    def _endless(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.loader

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.method.parameters() if p.requires_grad]

    def _freeze(self, clock: Clock) -> None:
        """Prototypes stand still in the first epochs."""
        if clock.epoch < self.config.distill.freeze_last_epochs:
            for name, parameter in self.method.student.named_parameters():
                if name.endswith("net.last"):
                    parameter.grad = None

    def _skip(self, drawn: list[tuple[list[int], Tensor]]) -> None:
        """Count a step that was not taken, and name the images of all ranks whose loss was not finite."""
        self.skipped, self.bad_in_a_row = self.skipped + 1, self.bad_in_a_row + 1
        bad = [images for images, loss in drawn if not bool(torch.isfinite(loss))]
        found: list[Any] = [[self._keys(bad), self._keys([images for images, _ in drawn])]] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(found, found[0])
        blamed = [key for keys, _ in found for key in keys] or [key for _, keys in found for key in keys]
        reason = "non-finite loss" if any(keys for keys, _ in found) else "non-finite gradient"
        self.monitor.event("skipped", step=self.step + 1, reason=reason, images=blamed)
        if self.bad_in_a_row >= self.config.train.max_bad_steps:
            raise DataError(
                f"{self.bad_in_a_row} steps in a row had a non-finite loss or gradient",
                path=self.out,
                found=f"learning rate {self.optimiser.param_groups[0]['lr']:.2g}, precision {self.config.train.precision}",
                fix="lower train.lr, use train.precision=bf16 or fp32, or look at the images named in events.jsonl",
            )

    def _keys(self, batches: list[list[int]]) -> list[str]:
        return [str(self.store.rows[i]["key"]) for images in batches for i in images]

    def _scalars(self, metrics: dict[str, Any]) -> dict[str, float]:
        out = {}
        for name, value in metrics.items():
            if not isinstance(value, Tensor):
                out[name] = float(value)
            elif name.startswith(("lift_", "hidden_")):  # not every rank has seen a lesion
                seen = mean_over_ranks(value.isfinite().float())
                out[name] = float(mean_over_ranks(value.nan_to_num()) / seen)
            else:
                out[name] = float(mean_over_ranks(value))
        return out

    def _reach(self, views: Tensor) -> dict[str, Tensor]:
        """How far the heads of every stage look, in two clean views: see `models.reach`."""
        encoder = (self.method.teacher or self.method.student).encoder
        found, _ = reach(encoder, views[0] if self.family.views == 2 else views[:2])
        return {
            f"reach_{what}_{number}": value
            for number, r in enumerate(found.values(), 1)
            for what, value in (("entropy", r.entropy.mean()), ("variance", r.entropy.var(correction=0)))
        }

    def _picture(self) -> None:
        item = self.loader.dataset[0]
        view = window(
            torch.from_numpy(item["views"][:1]).to(self.device_run.device), *self.config.data.window
        )
        path = self.out / "figures" / f"step-{self.step:06d}.png"
        clock = Clock(self.step - 1, self.config.train.steps, self.per_epoch, self.rank, self.world)
        guided = self.config.mask.strategy.startswith("attention") and bool(self.method.guides(clock))
        self.family.picture(self.method, view, path, f"step {self.step}", guided)
        self.monitor.picture(path)

    # ---- folder, resuming, signals

    def _begin_folder(self) -> None:
        if not self.main:
            return
        checkpoint.set_aside(self.damaged)
        self.out.mkdir(parents=True, exist_ok=True)
        self.config.save(self.out / "config.yaml")
        facts = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "device": str(self.device_run.device),
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "data": self.store.fingerprint,
            "images": len(self.store),
            "places": self.places,
            "command": sys.argv[:1],
        }
        write_text(self.out / "environment.json", json.dumps(facts, indent=1))

    def _load(self, allow_changes: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and training state of the newest whole checkpoint, if it is one of the same settings and data."""
        method, state, self.damaged = (
            checkpoint.newest_whole(self.out) if self.main else ({}, {"step": 0}, [])
        )
        step, self.damaged = from_main((state["step"], self.damaged))
        if not self.main:
            method, state = checkpoint.load(checkpoint.folder(self.out, step))
        if (
            state["header"]["data"] == self.store.fingerprint
        ):  # as runs of 0.1 noted it, labels and splits included
            state["header"]["data"] = self.header["data"]
        changed = checkpoint.differences(state["header"], self.header)
        if changed and not allow_changes:
            raise UseError(
                "cannot resume: the settings or the data changed since",
                path=self.out,
                found="; ".join(changed),
                fix="use the old settings, or allow_changes=True (--allow-changes) if you mean it",
            )
        return method, state


def _is_of(store: Store, manifest: str) -> bool:
    try:
        return load_manifest(manifest).name == store.header["manifest"]
    except SmartlabError:
        return False


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbours give unrelated seeds."""
    value = 0
    for number in numbers:
        value = (value ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 31
    return value >> 1


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process, on the GPU where it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
