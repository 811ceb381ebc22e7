"""`ablation.md`: what a batch found, as a page with tables and figures that needs nothing to be read."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.batch.plan import Plan
from smartlab.batch.results import (
    ESTIMATE,
    effects,
    factors,
    load_results,
    load_runs,
    one_metric,
    seed_column,
    summarise,
)
from smartlab.core.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_METRICS = 8  # in tables, those with intervals first
MOST_FIGURES = 4  # metrics drawn per step
MOST_ROWS = 60  # of a table; results.csv has them all


def write_report(out: str | Path, plan: Plan | None = None, metrics: Sequence[str] | None = None) -> Path:
    """Write `ablation.md` and its figures into the folder of a batch."""
    out = Path(out)
    runs, table = load_runs(out), load_results(out)
    lines = _head(plan, runs, table)
    for step in table.step.unique():
        rows = table[table.step == step]
        other = [name for name in rows if name not in ESTIMATE and rows[name].isna().all()]  # of other steps
        rows = rows.drop(columns=other)
        lines += _step(out, step, rows, metrics)
    lines += _failures(runs)
    path = out / "ablation.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _head(plan: Plan | None, runs: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    done, failed = int((runs.state == "done").sum()), int((runs.state == "failed").sum())
    lines = [f"# {plan.title if plan else 'Ablation'}", ""]
    lines += [plan.about, ""] if plan and plan.about else []
    if table.smoke.fillna(True).astype(bool).any():
        lines += ["**Small demonstration runs: they show that everything works, not how well.**", ""]
    lines += [
        f"{done} runs done, {failed} failed; {runs.seconds.sum() / 3600:.1f} hours of notebook time. "
        f"Code {', '.join(sorted(table.code.dropna().unique()))}; "
        f"{table.data.dropna().nunique()} data fingerprint(s); written {time.strftime('%Y-%m-%d %H:%M')}.",
        "",
        "Intervals are 95%: over seeds (t) where there are several, over patients where a cell is a single run. "
        "All numbers: `results.csv`.",
        "",
    ]
    return lines


def _choose(rows: pd.DataFrame, wanted: Sequence[str] | None) -> list[str]:
    if wanted is not None:
        return [name for name in wanted if name in set(rows.metric)]
    rows = rows[rows.value.notna()]
    certain = set(rows[rows.low.notna()].metric)
    moving = [str(m) for m, part in rows.groupby("metric", sort=False) if part.value.nunique() > 1]
    ordered = [m for m in moving if m in certain] + [m for m in moving if m not in certain]
    return (ordered or [str(m) for m in rows.metric.unique()])[:MOST_METRICS]


def _step(out: Path, step: str, rows: pd.DataFrame, wanted: Sequence[str] | None) -> list[str]:
    from smartlab.core import plots
    from smartlab.viewers import ablations

    names, seed = factors(rows), seed_column(rows)
    seeds = rows[seed].nunique() if seed else 1
    varied = ", ".join(f"`{n}`" for n in names) or "nothing"
    lines = [f"## {step}", "", f"Varied: {varied}; {seeds} seed(s).", ""]
    metrics = _choose(rows, wanted)
    tables = {metric: summarise(rows, metric, names) for metric in metrics}
    lines += _cells(tables, names)
    for metric in metrics[:MOST_FIGURES]:
        lines += [f"### {metric}", ""]
        found = effects(one_metric(rows, metric), metric)
        if len(found):
            lines += [
                "Each level against the first, all else equal (p after Holm):",
                "",
                *_effects(found),
                "",
            ]
        for kind, figure in draw(rows, metric, names).items():
            path = plots.save(figure, out / "figures" / f"{step}-{_safe(metric)}-{kind}.png")
            lines += [f"![{metric}, {kind}]({path.relative_to(out)})", ""]
            ablations.close(figure)
    return lines


def draw(rows: pd.DataFrame, metric: str, names: Sequence[str]) -> dict[str, Figure]:
    """The pictures that suit the factors: a forest always, a heat map of two, a curve over a number."""
    from smartlab.viewers import ablations

    found = {"forest": ablations.forest(summarise(rows, metric, names), names, metric)}
    by_levels = sorted(names, key=lambda name: -rows[name].nunique())
    if len(names) > 1:
        x, y = by_levels[:2]
        found["heat"] = ablations.heat(summarise(rows, metric, [y, x]), x, y, metric)
    numbers = [n for n in by_levels if is_number(rows[n]) and rows[n].nunique() > 2]
    if numbers:
        x, others = numbers[0], [n for n in by_levels if n != numbers[0] and rows[n].nunique() <= 6]
        by = others[0] if others else None
        found["curve"] = ablations.dose(summarise(rows, metric, [*([by] if by else []), x]), x, by, metric)
    return found


def is_number(column: pd.Series) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in column)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _cells(tables: dict[str, pd.DataFrame], names: list[str]) -> list[str]:
    """One row per combination, one column per metric."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for metric, table in tables.items():
        for row in table.to_dict("records"):
            cells.setdefault(tuple(row[n] for n in names), {})[metric] = _estimate(row)
    body = [
        [*(f"{value}" for value in level), *(found.get(m, "") for m in tables)]
        for level, found in cells.items()
    ]
    lines = _table([*names, *tables], body[:MOST_ROWS])
    return [*lines, *([f"… and {len(body) - MOST_ROWS} more."] if len(body) > MOST_ROWS else []), ""]


def _estimate(row: Mapping[Any, Any]) -> str:
    if math.isnan(row["low"]):
        return f"{row['value']:.4g}"
    return f"{row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"


def _effects(found: pd.DataFrame) -> list[str]:
    body = [
        [f"`{r['factor']}`", f"{r['level']} − {r['against']}", _estimate(r), _p(r["p"]), f"{r['n']}"]
        for r in found.to_dict("records")
    ]
    return _table(["factor", "levels", "difference", "p", "seeds"], body)


def _p(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _failures(runs: pd.DataFrame) -> list[str]:
    failed = runs[runs.state == "failed"]
    if failed.empty:
        return []
    body = [[str(r.step), str(r.run), str(r.error)] for r in failed.itertuples()]
    return ["## Failed", "", *_table(["step", "run", "error"], body[:MOST_ROWS]), ""]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    first, *rows = (f"| {' | '.join(map(_cell, row))} |" for row in [head, *body])
    return [first, "| " + " | ".join("---" for _ in head) + " |", *rows]


def _cell(text: str) -> str:
    """A text that stays in its cell and is no HTML: a parameter or an error may hold anything."""
    return " ".join(html.escape(text, quote=False).split()).replace("|", "\\|")
