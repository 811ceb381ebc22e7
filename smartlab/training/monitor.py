"""What a run tells: metrics.csv, events.jsonl, a tracker, progress, and alarms.

`metrics.csv` is append-only, one row per logged step; on resuming, rows after the checkpoint are
dropped, because those steps are about to be done again. Only the main process writes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.core.config import Config
from smartlab.core.files import write_text
from smartlab.training.live import Live, in_notebook
from smartlab.training.track import open_tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

COLUMNS = [
    "step",
    "epoch",
    "loss",
    "loss_amip",
    "loss_ampd",
    "loss_itd",
    "loss_gitd",
    "loss_coarse",
    "lr",
    "weight_decay",
    "momentum",
    "teacher_temperature",
    "grad_norm",
    "head_diversity",
    "head_divergence",
    "attention_entropy",
    "attention_informativeness",
    "attention_gain",
    "attention_hidden",
    "lift_body",
    "lift_organ",
    "lift_lesion",
    "hidden_body",
    "hidden_organ",
    "hidden_lesion",
    "guided",
    "teacher_entropy",
    "teacher_kl_uniform",
    "token_constant",
    "feature_std",
    "effective_rank",
    "views_per_second",
    "data_wait",
    "peak_memory_mb",
    "skipped",
]


def columns(config: Config) -> list[str]:
    """Columns of metrics.csv: the same for every method, then the loss of each scale, the reach of each stage."""
    scales = config.mae.scales if config.method.family == "multiscale_mae" else ()
    stages = config.encoder.blocks if config.encoder.kind == "vit" else 4
    reach = [f"reach_{what}_{stage + 1}" for stage in range(stages) for what in ("entropy", "variance")]
    return [*COLUMNS, *(f"loss_scale_{scale}" for scale in scales), *reach]


class Monitor:
    """Writes what happens in a run folder. A disabled monitor (other ranks) writes nothing."""

    def __init__(self, run: Path, config: Config, enabled: bool, progress: bool, start: int) -> None:
        self.run, self.config, self.enabled = run, config, enabled
        self.alarms: dict[str, int] = {}
        self._guided: float | None = None
        self._spread: deque[float] = deque(maxlen=5)
        self._started, self._first = time.monotonic(), start
        self._bar: Any = None
        self._tracker: GeneralTracker | None = None
        self._live: Live | None = None
        if not enabled:
            return
        rewind(run / "metrics.csv", start)
        self.columns = columns(config)
        self._tracker = open_tracker(config, run, start)
        if progress and in_notebook():
            self._live = Live(run.name, config.train.steps, start)
        elif progress:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=config.train.steps,
                initial=start,
                desc=run.name,
                unit="step",
                mininterval=1.0,
                dynamic_ncols=True,
            )

    def row(self, values: dict[str, float]) -> None:
        """One logged step."""
        if not self.enabled:
            return
        path = self.run / "metrics.csv"
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        if not path.exists() or not path.stat().st_size:
            writer.writerow(self.columns)
        writer.writerow([_text(values.get(name)) for name in self.columns])
        with path.open("a", encoding="utf-8") as file:  # one write per row: a killed run leaves whole rows
            file.write(buffer.getvalue())
        if self._tracker is not None:
            told = {k: v for k, v in values.items() if k not in ("step", "epoch") and math.isfinite(v)}
            self._tracker.log(told, int(values["step"]))
        if self._live is not None:
            self._live.update(values)
        self._alarm(values)

    def tick(self, loss: float, steps: int = 1) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(steps)

    def picture(self, path: Path) -> None:
        """Show a new picture of a masked view where somebody watches."""
        if self._live is not None:
            self._live.picture(path)

    def event(self, kind: str, **facts: Any) -> None:
        """Something worth remembering: a warning, a skipped batch, a save."""
        if self.enabled:
            line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": kind, **facts})
            with (self.run / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def warn(self, kind: str, step: int, message: str) -> None:
        """A warning, said when it first holds and again only after it went away."""
        if self.alarms.get(kind) is None:
            self.event("warning", about=kind, step=step, message=message)
            if self._bar is not None:
                self._bar.write(f"warning at step {step}: {message}")
            if self._live is not None:
                self._live.note(f"step {step}: {message}")
        self.alarms[kind] = step

    def finish(self, step: int) -> None:
        """The last word: also if the guard never let attention choose the masks."""
        if self._guided == 0.0 and self.config.mask.strategy.startswith("attention"):
            self.warn(
                "never_guided",
                step,
                f"masks ended random: attention was not mask.informativeness={self.config.mask.informativeness} "
                "times as informative as an untrained network's, or mask.warmup_epochs not over; train longer",
            )
        self.event("finished", step=step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._tracker is not None:
            self._tracker.finish()

    def _alarm(self, row: dict[str, float]) -> None:
        """Collapse and near-uniform attention, in words."""
        step, d, loss = int(row["step"]), self.config.distill, self.config.loss
        found = {}
        if self._guided is not None and row.get("guided") != self._guided:
            self.event("masks", step=step, now="guided" if row["guided"] else "random")
        self._guided = row.get("guided")
        uniform = row.get("teacher_entropy", 1.0) + row.get("teacher_kl_uniform", 0.0)  # ln K
        sharp = row.get("teacher_entropy", 1.0) < 0.02 * uniform
        if step > 50 and sharp and d.kind == "prototype":  # of channels, entropy falls as views spread
            found["one_answer"] = (
                f"the teacher gives nearly the same answer to every view (entropy {row['teacher_entropy']:.3f} "
                f"of ln K = {uniform:.2f}): collapse"
            )
        if step > 50 and row.get("effective_rank", 2.0) < 1.05:
            found["one_dimension"] = "image tokens vary along one direction only (effective rank < 1.05)"
        if d.kind == "prototype" and self.config.teacher.enabled and step > 50:
            ceiling = math.log(d.prototypes)
            for term, weight in (("ampd", loss.patch), ("itd", loss.image), ("gitd", loss.global_image)):
                if weight and row.get(f"loss_{term}", 0.0) > 0.99 * ceiling:
                    found[f"{term}_flat"] = (
                        f"loss_{term} sits at ln K = {ceiling:.2f}: nothing is learned from it; "
                        "try distill.kind=regression, or larger batches"
                    )
        self._spread.append(row.get("feature_std", 1.0))  # a few views are a noisy measure: five in a row
        if step > 50 and len(self._spread) == 5 and max(self._spread) < 0.01:
            found["collapse"] = (
                "image tokens of different views are nearly equal (feature_std < 0.01, five times in a row): collapse"
            )
        if step > 50 and row.get("token_constant", 0.0) > 0.9 and d.kind == "regression":
            found["constant_tokens"] = (
                f"{row['token_constant']:.0%} of the patch tokens to be predicted is the same everywhere: there is "
                "little to learn from them; try distill.standardise=true"
            )
        if step > 50 and row.get("guided", 0.0) and row.get("attention_gain", 2.0) < 1.05:
            found["uniform_attention"] = (
                "masks are guided by attention no more informative than an untrained network's (attention_gain "
                f"{row['attention_gain']:.2f}): they may be as good as random"
            )
        for kind in [kind for kind in self.alarms if kind not in found]:
            del self.alarms[kind]
        for kind, message in found.items():
            self.warn(kind, step, message)


def rewind(path: Path, step: int) -> None:
    """Keep the header and the rows up to and including `step`; what is no whole row goes too."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    commas = lines[0].count(",") if lines else 0
    whole = [line for line in lines if line.endswith("\n") and line.count(",") == commas]
    numbers = [line.partition(",")[0] for line in whole]
    kept = whole[:1] + [
        w for n, w in zip(numbers[1:], whole[1:], strict=True) if n.isdecimal() and int(n) <= step
    ]
    write_text(path, "".join(kept))


def _text(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
