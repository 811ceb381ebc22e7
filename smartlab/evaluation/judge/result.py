"""What every evaluation returns: metrics with intervals, a table, a figure, and where they came from.

An `Estimate` is a number with a 95% interval and the number of patients behind it. A `Result` holds
estimates by name, one tidy table (a row per case, fold or class: whatever the task counts), a function
that draws the task's figure, and the facts needed to believe it. `save` writes `result.json`,
`table.csv` and `figure.png`, each under a temporary name first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smartlab.core.files import write_text
from smartlab.core.places import code_version

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Estimate(NamedTuple):
    """A value with its 95% interval; n is the number of patients (or draws) it rests on."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def clipped(self, low: float, high: float = math.inf) -> Estimate:
        """The same with its interval cut where no value can be."""
        return self._replace(low=max(self.low, low), high=min(self.high, high))

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass
class Result:
    """The outcome of one task on one encoder.

    >>> result = sl.evaluate("runs/a", "probe", "phantom-ct", label="malignancy")
    >>> result.metrics["auc"], result.table, result.figure()
    """

    task: str
    metrics: dict[str, Estimate]
    table: pd.DataFrame
    draw: Callable[[], Figure]
    facts: dict[str, Any] = field(default_factory=dict)  # encoder, data fingerprint, seed, settings, n

    def figure(self) -> Figure:
        return self.draw()

    def __repr__(self) -> str:
        lines = [f"{self.task}:"] + [f"  {name:<28} {value}" for name, value in self.metrics.items()]
        return "\n".join(lines)

    def save(self, out: str | Path) -> Path:
        """Write result.json, table.csv and figure.png into the folder `out`."""
        from smartlab.core import plots

        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        content = {
            "task": self.task,
            "metrics": {name: clean(value._asdict()) for name, value in self.metrics.items()},
            **clean(self.facts),
            "code": code_version(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        write_text(out / "table.csv", self.table.to_csv(index=False))
        plots.save(self.figure(), out / "figure.png")
        write_text(out / "result.json", json.dumps(content, indent=1))  # last: its presence says "complete"
        return out


def clean(value: Any) -> Any:
    """The same nested value in plain JSON types; not-a-number becomes None."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
