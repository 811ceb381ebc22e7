"""A protocol with everything chosen: what it would cost, doing it, and its figures beside the paper's."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from smartlab.core.errors import UseError
from smartlab.core.settings import DataConfig
from smartlab.data.cohort.manifest import Manifest
from smartlab.data.images.grid import in_mm
from smartlab.data.store.prepare import locate_images, prepare_store
from smartlab.evaluation.evaluate import evaluate
from smartlab.evaluation.finetune.trainer import HELD_OUT
from smartlab.evaluation.judge import figures
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.protocols.table import Paper, Part, Protocol
from smartlab.models.build import make_encoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TFLOPS = 10.0  # operations per second of one GPU, sustained: assumed for the estimate of hours, not measured
LEAST_SECONDS = 0.05  # of a training step, however small the network: assumed as well
LOOKS = 50  # at the validation score during a training, which goes on to its end and keeps the best
NOWHERE = Estimate(math.nan)


class Own(BaseModel):
    """Settings of the protocol itself, beside those of its tasks.

    shares: of the training patients, only these.   epochs: of fine-tuning, in place of the protocol's.
    tflops: what your GPU sustains, for the estimate of hours.
    """

    model_config = ConfigDict(extra="ignore")

    shares: list[float] | None = None
    epochs: PositiveInt | None = None
    tflops: PositiveFloat = TFLOPS


@dataclass(frozen=True)
class Prepared:
    """Made by `plan_protocol`; printed, its plan and cost."""

    name: str
    protocol: Protocol
    parts: list[Part]
    encoder: Any
    facts: dict[str, Any]  # of the encoder
    manifest: Manifest
    label: str | None
    root: str | Path | None
    seed: int
    own: Own
    settings_given: dict[str, Any]  # of tasks, in place of the protocol's
    changed: dict[str, Any]  # all that is not the protocol's

    def settings(self, part: Part) -> dict[str, Any]:
        """Of one part, as `evaluate` takes them."""
        chosen = part.settings | {k: v for k, v in self.settings_given.items() if k in part.known}
        if not part.trains:
            return chosen
        if epochs := part.epochs and (self.own.epochs or part.epochs):
            steps = epochs * math.ceil(self.learned(part) / chosen["batch"])
            chosen = {"steps": steps} | chosen
        every = max(1, chosen["steps"] // LOOKS)
        looks = {"validate_every": every, "checkpoint_every": every, "patience": LOOKS + 1}
        return looks | chosen | {"fractions": [part.share], "resume": True}

    def learned(self, part: Part) -> float:
        """Cases that one training learns from, about."""
        there = [c for c in self.manifest.cases if not self.protocol.test or c.split != "test"]
        return part.share * len(there) * (1 - 1 / (self.protocol.folds or 1)) * (1 - 1 / HELD_OUT)

    @cached_property
    def cost(self) -> pd.DataFrame:
        """A row per part: what is done, how often, TFLOP of each, GPU hours."""
        rows, counted = [], {}
        cases = len(self.manifest.cases) or self.protocol.cases or 0
        for part in self.parts:
            s, data = self.settings(part), self.encoder.config.data
            size = s["size"] if part.trains else 64 if self.protocol.data else s.get("size", data.view)
            if (part.task, size) not in counted:
                counted[part.task, size] = operations(part.task, self.encoder, size) / 1e12
            if part.trains:
                times = (len(s["modes"]) * (self.protocol.folds or 1), s["steps"])
                what = f"{times[0]} trainings × {times[1]:,} steps of {s['batch']} crops of {size}³"
                each = 3 * s["batch"] * counted[part.task, size]  # backward: twice the forward pass
                seconds = max(LEAST_SECONDS, each / self.own.tflops)
            else:
                times, each = (2, cases), counted[part.task, size]
                what = f"{cases:,} crops of {size}³, this and an untrained encoder"
                seconds = each / self.own.tflops
            rows.append((part.name, part.task, what, *times, each, math.prod(times) * seconds / 3600))
        columns = ["part", "task", "what", "trainings", "number", "tflop", "gpu_hours"]
        return pd.DataFrame(rows, columns=columns)

    def as_json(self) -> dict[str, Any]:
        return {
            "protocol": self.name,
            "manifest": self.manifest.name,
            "label": self.label,
            "cases": len(self.manifest.cases),
            "gpu_hours": float(self.cost.gpu_hours.sum()),
            "assumed": {"tflops": self.own.tflops, "least_seconds_a_step": LEAST_SECONDS},
            "parts": self.cost.to_dict("records"),
            "changed": self.changed,
            "unlike_the_paper": self.protocol.unlike,
        }

    def __str__(self) -> str:
        cases, hours = self.manifest.cases, self.cost.gpu_hours.sum()
        lines = [f"{self.name} on {self.manifest.name}, {len(cases) or self.protocol.cases:,} cases"]
        labels = [case.labels.get(self.label or "") for case in cases]
        for what, values in ((self.label, labels), ("split", [case.split for case in cases])):
            if counts := Counter(str(value) for value in values if value is not None):
                lines.append(f"  {what}: " + ", ".join(f"{n} {value}" for value, n in counts.most_common()))
        lines += [
            f"  {row.part:<18} {row.what}, {row.tflop:.2g} TFLOP each: {row.gpu_hours:.2g} h"
            for row in self.cost.itertuples()
        ]
        lines += [
            f"  in all about {hours:.2g} GPU hours. An estimate: operations are counted for this encoder, a GPU is assumed",
            f"  to do {self.own.tflops:g} TFLOP a second (tflops=…), a step to take {LEAST_SECONDS:g} s at least; without reading and testing",
            *([f"  changed here: {_words(self.changed)}"] if self.changed else []),
            "  unlike the paper:",
            *(f"  - {line}" for line in self.protocol.unlike),
        ]
        return "\n".join(lines)

    def run(self, out: str | Path, *, store: str | Path | None = None, progress: bool = True) -> Result:
        """Do it: each part in a folder of its own below `out`. Stopped, the same call goes on where it was.

        store: folder of the protocol's store, with its cases and splits; by default beside the images.
        """
        out, spacing = Path(out), self.encoder.config.data.spacing
        place = None if self.root is None else str(self.root)
        data = DataConfig(
            manifest=self.manifest.name,
            root=place,
            spacing=spacing,
            workers=self.settings_given.get("workers", 2),
        )
        man, root = locate_images(data, progress, self.manifest)
        if not man.cases:
            fix = f"run `smartlab data fetch {man.name} --root {root}`"
            raise UseError(f"no case of {man.name} is listed", path=root, fix=fix)
        data.store = str(store or root.parent / f"{root.name}-store-{in_mm(spacing)}mm-{self.name}")
        man, opened = prepare_store(data, progress, (man, root))
        more: dict[str, Any] = {"root": root, "store": opened, "seed": self.seed, "progress": progress}
        more |= {} if self.label is None else {"label": self.label}
        results = {
            part.name: evaluate(
                self.encoder, part.task, man, out=out / part.folder, **more, **self.settings(part)
            )
            for part in self.parts
        }
        result = self._beside(results)
        result.save(out)
        return result

    def _beside(self, results: dict[str, Result]) -> Result:
        """Own figures with the paper's."""
        rows = []
        for part in self.parts:
            found = results[part.name].metrics
            for metric, paper in part.paper.items():
                bare = found.get(part.untrained(metric), NOWHERE)
                rows.append((part.name, metric, *found.get(metric, NOWHERE), bare.value, *paper))
        columns = ["part", "metric", *Estimate._fields, "untrained", *Paper._fields]
        table = pd.DataFrame(rows, columns=columns)
        facts = self.facts | {
            "manifest": self.manifest.name,
            "label": self.label,
            "seed": self.seed,
            "changed": self.changed,
            "unlike_the_paper": self.protocol.unlike,
            "figures": table.to_dict("records"),
        }
        metrics = {f"{name}: {k}": v for name, one in results.items() for k, v in one.metrics.items()}
        return Beside(self.name, metrics, table, lambda: draw(self.name, table), facts)


class Beside(Result):
    """A result that prints the paper's figures beside its own."""

    def __repr__(self) -> str:
        lines = [f"{self.task}:", f"  {'':<34} {'yours':<22} {'untrained':>9} {'SMIT':>6} {'DAGMaN':>7}"]
        for row in self.table.to_dict("records"):
            own = Estimate(*(row[k] for k in Estimate._fields))
            paper = f"{row['smit']:>6.3g} {row['dagman']:>7.3g}  {row['where']}"
            lines.append(
                f"  {row['part'] + ', ' + row['metric']:<34} {own!s:<22} {row['untrained']:>9.3f} {paper}"
            )
        if self.facts["changed"]:
            lines.append(f"  not the protocol as it is: {_words(self.facts['changed'])}")
        return "\n".join(
            [*lines, "  yours with 95% interval; what is unlike the paper: --dry-run, result.json"]
        )


def operations(task: str, encoder: Any, size: int) -> float:
    """Floating-point operations of one crop through the net of a task, forward; counted, not computed."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from smartlab.evaluation.finetune import classifier, segmenter

    build = {"segment": segmenter.build, "classify": classifier.build}.get(task)
    net: Any = build(encoder, 2, pretrained=False, seed=0) if build else make_encoder(encoder.config)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.no_grad(), FlopCounterMode(display=False) as counted:
        net.eval()(torch.empty(1, encoder.in_channels, size, size, size))
    return float(counted.get_total_flops())


def draw(name: str, table: pd.DataFrame) -> Figure:
    """Own figures with their intervals, those of an untrained net and the paper's, a row each."""
    figure, ((ax,),) = figures.panels(1, 8, 1.6 + 0.5 * len(table))
    rows = [Estimate(*one) for one in table[[*Estimate._fields]].itertuples(index=False)]
    names = [f"{row.part}, {row.metric}" for row in table.itertuples()]
    figures.listed(ax, dict(zip(names, rows, strict=True)), [figures.BLUE] * len(rows))
    ax.plot([], [], "o", color=figures.BLUE, label="yours")
    others = (("untrained", "x", "0.5"), ("SMIT", "|", figures.OTHERS[3]), ("DAGMaN", "d", figures.OTHERS[0]))
    for label, marker, colour in others:
        ax.scatter(table[label.lower()], range(len(table)), marker=marker, color=colour, label=label)
    ax.set_title(f"{name}: yours (95% interval) beside the paper's", fontsize=11)
    figures.legend(ax, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items())
