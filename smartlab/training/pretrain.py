"""Pretraining: a method of masked image modelling, through the one loop, into a run folder.

A step with a non-finite loss is skipped, counted and written to events.jsonl with its images.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smartlab.core.clock import Clock
from smartlab.core.config import Config, load_config
from smartlab.core.errors import DataError, SmartlabError
from smartlab.core.files import write_text
from smartlab.data.cohort.manifest import load_manifest
from smartlab.data.crops.augment import window
from smartlab.data.crops.loader import CropLoader
from smartlab.data.store.prepare import locate_images, prepare_store
from smartlab.methods.distillation import mean_over_ranks
from smartlab.models.reach import reach
from smartlab.training import schedules
from smartlab.training.engine import Engine, Part, mix, refuse_run
from smartlab.training.families import family_of, fitted
from smartlab.training.monitor import Monitor
from smartlab.training.requests import only_one
from smartlab.training.run import Run
from smartlab.training.setup import compile_report, make_accelerator, parameter_groups
from smartlab.training.track import check_tracker

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
        training = Pretraining(config, Path(out), resume, allow_changes, store, progress)
        try:
            if training.run():
                training.monitor.finish(training.step)
            else:
                training.monitor.event("stopped", step=training.step)
        finally:
            training.close()
    return Run(out)


class Pretraining(Engine):
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
        check_tracker(config.train.track)
        # without image and coarse loss nothing trains the query of [CLS]
        idle = config.semantic.enabled and not (config.loss.image or config.loss.coarse)
        accelerator = make_accelerator(config.train.precision, idle=idle)
        super().__init__(out, config.train, config.seed, accelerator)
        self.config, self.skipped = config, 0
        refuse_run(out, resume, "run")
        self.store, self.places = self._open(store, progress and self.main)
        self.config = config = fitted(config, self.store)
        self.family = family_of(config)
        header = {"config": json.dumps(config.model_dump(mode="json")), "data": self.store.voxels}
        fix = "use the old settings, or allow_changes=True (--allow-changes) if you mean it"
        self.find(header, allow_changes=allow_changes, fix=fix, older=self.store.fingerprint)
        self.images, held_out = self._training_images()
        loader = self._make_loader()
        self.per_epoch = self.train.steps_per_epoch or max(1, len(loader) // self.train.accumulate)
        torch.manual_seed(config.seed)
        images = Part(lambda: self.images, lambda _: None)  # see `_training_images`
        parts = self.keeps("skipped") | {"images": images}
        self.place(self.family.method(config), loader, parameter_groups, parts)
        if self.main:
            self._begin_folder()
        self.monitor = Monitor(out, config, self.main, progress and self.main, self.step)
        self._begin_events(held_out)
        self.first, self.began, self.seen, self.waited = self.step, time.monotonic(), 0, loader.wait_seconds

    # ---- what is trained

    def clock(self, step: int) -> Clock:
        return Clock(step, self.train.steps, self.per_epoch, self.rank, self.world)

    def logs(self, step: int) -> bool:
        return step % self.train.log_every == 0 or step in (1, self.train.steps)

    def before_step(self) -> None:
        train, step = self.train, self.step
        self.rates = {
            "lr": schedules.learning_rate(step, train, train.batch * train.accumulate * self.world),
            "weight_decay": schedules.weight_decay(step, train),
        }
        self.momentum = schedules.momentum(step, train, self.config.teacher)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rates["lr"]
            group["weight_decay"] = self.rates["weight_decay"] if group["decays"] else 0.0

    def loss(self, batch: dict[str, Any], micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Views of the scans, hidden and compared as the method does it."""
        generator = torch.Generator().manual_seed(mix(self.seed, self.step, micro))
        torch.manual_seed(mix(self.seed, self.step, micro, self.rank))
        names = self.store.label_names if self.logs(self.step + 1) else None
        shares_of = (self.config, self.device, generator, (self.rank, self.world), names)
        self.views, shares = self.family.prepare(batch, *shares_of)
        with self.accelerator.autocast():
            return self.model(self.views, self.clock(self.step), generator, shares)

    def before_update(self) -> dict[str, Any]:
        """How far the heads look; and prototypes stand still in the first epochs."""
        found = self._reach() if self.logs(self.step + 1) and not self.sharded else {}
        if self.clock(self.step).epoch < self.config.distill.freeze_last_epochs:
            for name, parameter in self.network.student.named_parameters():
                if name.endswith("net.last"):
                    parameter.grad = None
        return found

    def after_update(self) -> None:
        self.network.update_teacher(self.momentum)

    def not_finite(self, drawn: list[tuple[Any, Tensor]]) -> None:
        """Count a step that was not taken, and name the images of all ranks whose loss was not finite."""
        self.skipped += 1
        bad = [images for images, loss in drawn if not bool(torch.isfinite(loss))]
        found: list[Any] = [[self._keys(bad), self._keys([images for images, _ in drawn])]] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(found, found[0])
        blamed = [key for keys, _ in found for key in keys] or [key for _, keys in found for key in keys]
        reason = "non-finite loss" if any(keys for keys, _ in found) else "non-finite gradient"
        self.monitor.event("skipped", step=self.step + 1, reason=reason, images=blamed)
        if self.bad_in_a_row >= self.train.max_bad_steps:
            raise DataError(
                f"{self.bad_in_a_row} steps in a row had a non-finite loss or gradient",
                path=self.out,
                found=f"learning rate {self.rates['lr']:.2g}, precision {self.train.precision}",
                fix="lower train.lr, use train.precision=bf16 or fp32, or look at the images named in events.jsonl",
            )

    def _keys(self, batches: list[Tensor]) -> list[str]:
        return [str(self.store.rows[int(i)]["key"]) for images in batches for i in images]

    def _reach(self) -> dict[str, Tensor]:
        """How far the heads of every stage look, in two clean views: see `models.reach`."""
        encoder = (self.network.teacher or self.network.student).encoder
        found, _ = reach(encoder, self.views[0] if self.family.views == 2 else self.views[:2])
        return {
            f"reach_{what}_{number}": value
            for number, r in enumerate(found.values(), 1)
            for what, value in (("entropy", r.entropy.mean()), ("variance", r.entropy.var(correction=0)))
        }

    # ---- what is told

    def after_step(self, metrics: dict[str, Any]) -> None:
        train, clock = self.train, self.clock(self.step - 1)
        if train.compile and self.step == self.first + 1:
            seconds = round(time.monotonic() - self.began, 1)
            self.monitor.event("compiled", seconds=seconds, **compile_report())
        self.seen += self.family.views * train.batch * train.accumulate * self.world
        if self.logs(self.step):
            told = {"step": self.step, "epoch": clock.epoch, **self.rates, "skipped": self.skipped}
            told |= self.network.told(clock, self.momentum) | self._pace()
            self.monitor.row(self._scalars(metrics | told))
        if self.monitor.enabled:
            self.monitor.tick(float(metrics["loss"]))
            if not self.sharded and (self.step % train.picture_every == 0 or self.step == train.steps):
                self._picture(clock)

    def _pace(self) -> dict[str, float]:
        """What went by since the row before."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        told = {
            "views_per_second": self.seen / elapsed,
            "data_wait": (self.loader.wait_seconds - self.waited) / elapsed,
            "peak_memory_mb": peak_memory_mb(self.device),
        }
        self.began, self.seen, self.waited = time.monotonic(), 0, self.loader.wait_seconds
        return told

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

    def _picture(self, clock: Clock) -> None:
        views = self.loader.dataset[0]["views"]
        first = views[0] if self.store.leading else views[:1]  # (C, D, H, W)
        view = window(torch.from_numpy(first).to(self.device), *self.config.data.window)
        path = self.out / "figures" / f"step-{self.step:06d}.png"
        guided = self.config.mask.strategy.startswith("attention") and bool(self.network.guides(clock))
        self.family.picture(self.network, view, path, f"step {self.step}", guided)
        self.monitor.picture(path)

    def save(self) -> None:
        super().save()
        self.monitor.event("saved", step=self.step)

    def close(self) -> None:
        super().close()
        self.monitor.close()

    # ---- data and folder

    def _open(self, store: Store | None, progress: bool) -> tuple[Store, dict[str, str | None] | None]:
        """The store, and the places of manifest, images and store as far as one can tell."""
        data = self.config.data
        if store is not None:
            return store, {} if _is_of(store, data.manifest) else None
        with self.accelerator.main_process_first():
            located = locate_images(data, progress)
            _, store = prepare_store(data, progress, located)
        named = Path(data.manifest)
        places: dict[str, str | None] = {"manifest": str(named.absolute() if named.exists() else named)}
        return store, places | {"root": str(located[1].absolute()), "store": str(store.path)}

    def _training_images(self) -> tuple[list[int], int]:
        """Positions in the store of the images to train on, and how many of a run's own are no longer among them."""
        cases = self.store.cases
        now = sorted({int(i) for i in cases.image[(cases.split == "train") | cases.split.isna()]})
        if "images" not in self.state or self.state["header"]["data"] != self.header["data"]:
            return now, 0
        return self.state["images"], len({*self.state["images"]} - {*now})

    def _make_loader(self) -> CropLoader:
        train = self.train
        least = train.batch * self.world * train.accumulate
        return CropLoader(
            self.family.dataset(self.store, self.config, self.images, least),
            train.batch,
            workers=self.config.data.workers,
            seed=self.seed,
            rank=self.rank,
            world=self.world,
        )

    def _begin_folder(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.config.save(self.out / "config.yaml")
        facts = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "device": str(self.device),
            "processes": self.world,
            "threads": torch.get_num_threads(),
            "data": self.store.fingerprint,
            "images": len(self.store),
            "places": self.places,
            "command": sys.argv[:1],
        }
        write_text(self.out / "environment.json", json.dumps(facts, indent=1))

    def _begin_events(self, held_out: int) -> None:
        begins = "resume" if self.step else "start"
        self.monitor.event(begins, step=self.step, images=len(self.store), processes=self.world)
        if self.damaged:
            names = [path.name for path in self.damaged]
            self.monitor.event("damaged checkpoint", text=self.damage(), checkpoints=names)
        if held_out:
            text = "the split changed since: the run goes on with the images it began with"
            self.monitor.event("split", text=text, images=len(self.images), now_held_out=held_out)
            if self.main:
                print(f"{text}; {held_out} of them are held out by now", file=sys.stderr)


def _is_of(store: Store, manifest: str) -> bool:
    try:
        return load_manifest(manifest).name == store.header["manifest"]
    except SmartlabError:
        return False


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process, on the GPU where it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
