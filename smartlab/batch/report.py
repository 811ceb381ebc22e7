"""What a batch found: `ablation.md`, and `report.html` with the runs' pictures and links to their notebooks and logs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.batch import records
from smartlab.batch.blocks import (
    Bar,
    Block,
    Cell,
    Estimate,
    Heading,
    Link,
    OnPage,
    Pictures,
    Table,
    Text,
    Thumbnail,
    as_markdown,
    as_page,
)
from smartlab.batch.plan import Plan
from smartlab.batch.progress import COLUMNS, Standing
from smartlab.batch.results import (
    ESTIMATE,
    FACTS,
    effects,
    factors,
    load_results,
    load_runs,
    one_metric,
    seed_column,
    summarise,
    unaffected,
)
from smartlab.core.files import write_text
from smartlab.training.live import clock

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_METRICS = 8  # in tables, those with intervals first
MOST_FIGURES = 4  # metrics drawn per step
MOST_ROWS = 60  # of a table; results.csv has them all
MOST_THUMBNAILS = 40  # of one kind of picture
MOST_KINDS = 3
FEW = 12  # runs that are listed at once, and not only on a click
PAGE = "report.html"


def write_report(out: str | Path, plan: Plan | None = None, metrics: Sequence[str] | None = None) -> Path:
    """Write `ablation.md`, its figures and `report.html` into the folder of a batch."""
    out = Path(out)
    title, blocks = _title(plan), _told(out, plan, _in_order(load_runs(out), plan), metrics=metrics)
    write_text(out / PAGE, as_page(title, blocks, out))
    write_text(out / "ablation.md", as_markdown(title, blocks, out))
    return out / "ablation.md"


def write_progress(out: Path, plan: Plan, standing: Standing) -> None:
    """Write `report.html` while a batch runs: where it stands, and the tables and pictures of what is done."""
    runs = _in_order(load_runs(out), plan)
    runs = runs[runs.state.isin([records.DONE, records.FAILED])]
    rows = standing.rows()
    ended = sum(map(standing.sum, ("done", "failed")))
    head: list[Block] = [
        Bar(ended / max(1, sum(map(standing.sum, COLUMNS)))),
        Text(str(standing), "headline"),
        Text(f"As of {time.strftime('%H:%M:%S')}; this page fills while the batch runs.", "waiting"),
    ]
    if len(rows) > 1:
        head.append(Table(["step", *COLUMNS, "time left"], rows))
    blocks = _told(out, plan, runs, head, figures=False)
    write_text(out / PAGE, as_page(_title(plan), blocks, out, refresh=10))


def _told(
    out: Path,
    plan: Plan | None,
    runs: pd.DataFrame,
    head: Sequence[Block] = (),
    metrics: Sequence[str] | None = None,
    figures: bool = True,
) -> list[Block]:
    failed = _failures(out, runs)
    if (head or failed) and not (runs.state == records.DONE).any():
        return [Text(plan.about if plan else ""), *head, *failed]
    table = _in_order(load_results(out), plan)
    return [*_about(plan, runs, table), *head, *failed, *_found(out, runs, table, metrics, figures)]


def _in_order(table: pd.DataFrame, plan: Plan | None) -> pd.DataFrame:
    """Rows in the order of the plan, so that its first level of each factor is what others are compared with."""
    if plan is None:
        return table
    seen: dict[str, list[Any]] = {"step": [step.name for step in plan.steps]}
    seen |= {factor: [c.get(factor) for c in plan.combinations] for factor in plan.factors}
    for factor, levels in reversed(seen.items()):
        places = {level: place for place, level in enumerate(dict.fromkeys(levels))}
        for name in {factor, factor.rpartition(".")[2]} & set(table):
            table = table.loc[table[name].map(places).sort_values(kind="stable").index]
    return table.reset_index(drop=True)


def _title(plan: Plan | None) -> str:
    return plan.title if plan else "Ablation"


def _about(plan: Plan | None, runs: pd.DataFrame, table: pd.DataFrame) -> list[Block]:
    done, failed = int((runs.state == records.DONE).sum()), int((runs.state == records.FAILED).sum())
    blocks: list[Block] = [Text(plan.about)] if plan and plan.about else []
    if table.smoke.fillna(True).astype(bool).any():
        small = "Small demonstration runs: they show that everything works, not how well."
        blocks.append(Text(small, "headline"))
    data = table.data[table.data != ""].nunique()
    facts = [
        f"{done} runs done, {failed} failed; {clock(runs.seconds.sum())} of notebook time",
        f"code {', '.join(sorted(table.code.dropna().unique()))}",
        *([f"{data} data fingerprint{'s' * (data > 1)}"] if data else []),
        f"written {time.strftime('%Y-%m-%d %H:%M')}.",
    ]
    over = (
        "Intervals are 95%: over seeds (t) where there are several, over patients where a cell is a single run. "
        "All numbers: `results.csv`."
    )
    return [*blocks, Text("; ".join(facts)), Text(over, "waiting")]


def _found(
    out: Path, runs: pd.DataFrame, table: pd.DataFrame, metrics: Sequence[str] | None, figures: bool
) -> list[Block]:
    blocks = _varied(runs)
    for step in table.step.unique():
        rows, mine = (_of_step(part, step) for part in (table, runs))
        blocks += _step(out, str(step), rows, metrics, figures)
        blocks.append(OnPage([*_pictures(mine), *_runs(out, mine)]))
    return blocks


def _of_step(table: pd.DataFrame, step: str) -> pd.DataFrame:
    """The rows of a step, without the parameters of other steps."""
    rows = table[table.step == step]
    return rows.drop(columns=[n for n in rows if n not in {*ESTIMATE, *FACTS} and rows[n].isna().all()])


def _varied(runs: pd.DataFrame) -> list[Block]:
    names, seed = factors(runs), seed_column(runs)
    shown = [*names, *([seed] if seed else [])]
    runs = runs if seed is None else runs.sort_values(seed, kind="stable")
    levels = {name: ", ".join(map(_level, runs[name].dropna().unique())) for name in shown}
    fixed = [n for n in runs if n not in {*FACTS, *shown, "root", "out"} and runs[n].notna().any()]
    same = [[f"`{n}`", _level(runs[n].dropna().iloc[0])] for n in fixed if str(runs[n].dropna().iloc[0])]
    blocks: list[Block] = [Heading("What was varied")]
    blocks.append(Table(["parameter", "levels"], [[f"`{n}`", text] for n, text in levels.items()]))
    if same:
        blocks.append(OnPage([Table(["parameter", "value"], same)], "The same in every run"))
    return blocks


def _level(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choose(rows: pd.DataFrame, wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The metrics to show, those with intervals first, and those that nothing varied here changes."""
    if wanted is not None:
        return [name for name in wanted if name in set(rows.metric)], []
    rows, names = rows[rows.value.notna()], factors(rows)
    certain = set(rows[rows.low.notna()].metric)
    every = sorted(map(str, rows.metric.unique()), key=lambda name: name not in certain)
    still = [m for m in every if names and len(unaffected(rows[rows.metric == m])) == len(names)]
    moving = [m for m in every if m not in still]
    return (moving, still) if moving else (every, [])


def _step(
    out: Path, step: str, rows: pd.DataFrame, wanted: Sequence[str] | None, figures: bool
) -> list[Block]:
    from smartlab.core import plots
    from smartlab.viewers import ablations

    names = factors(rows)
    metrics, still = _choose(rows, wanted)
    blocks: list[Block] = [Heading(step), _cells(rows, metrics[:MOST_METRICS], names)]
    if still:
        left_out = ", ".join(f"`{m}`" for m in still)
        blocks.append(Text(f"Not affected by anything that was varied, and left out: {left_out}."))
    if more := metrics[MOST_METRICS:]:
        blocks.append(OnPage([_cells(rows, more, names)], f"{len(more)} more metrics"))
    for metric in metrics[:MOST_FIGURES]:
        blocks += [Heading(metric, 3), *_effects(one_metric(rows, metric))]
        paths = []
        for kind, figure in draw(rows, metric, names).items() if figures else ():
            paths.append(plots.save(figure, out / "figures" / f"{step}-{_safe(metric)}-{kind}.png"))
            ablations.close(figure)
        blocks.append(Pictures(paths))
    return blocks


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


def _cells(rows: pd.DataFrame, metrics: Sequence[str], names: list[str]) -> Table:
    """One row per combination, one column per metric."""
    cells: dict[tuple[Any, ...], dict[str, Estimate]] = {}
    for metric in metrics:
        table = summarise(rows, metric, names)
        for row, estimate in zip(table.to_dict("records"), _estimates(table), strict=True):
            cells.setdefault(tuple(row[n] for n in names), {})[metric] = estimate
    body: list[list[Cell]] = [
        [*map(_level, level), *(found.get(m, "") for m in metrics)] for level, found in cells.items()
    ]
    return Table([*names, *metrics], body[:MOST_ROWS], max(0, len(body) - MOST_ROWS))


def _estimates(table: pd.DataFrame) -> list[Estimate]:
    """All on one scale, which an interval four times as wide as the usual one does not stretch."""
    import numpy as np

    low, high = table.low.fillna(table.value), table.high.fillna(table.value)
    most = 4 * (high - low).median()
    span = float(np.maximum(low, table.value - most).min()), float(np.minimum(high, table.value + most).max())
    numbers = table[["value", "low", "high"]].to_numpy(float)
    return [Estimate(value, a, b, span) for value, a, b in numbers.tolist()]


def _effects(rows: pd.DataFrame) -> list[Block]:
    """Differences between levels; that a factor changes nothing is said once."""
    metric, same = str(rows.metric.iloc[0]), unaffected(rows)
    found = effects(rows, metric)
    found = found[~found.factor.isin(same)].reset_index(drop=True)
    blocks: list[Block] = []
    if len(found):
        blocks.append(Text("Each level against the first, all else equal (p after Holm):"))
        scale = _estimates(found[["value", "low", "high"]])
        body: list[list[Cell]] = [
            [f"`{r['factor']}`", f"{_level(r['level'])} − {_level(r['against'])}", e, _p(r["p"]), f"{r['n']}"]
            for r, e in zip(found.to_dict("records"), scale, strict=True)
        ]
        blocks.append(Table(["factor", "levels", "difference", "p", "seeds"], body))
    if same:
        factors_ = ", ".join(f"`{name}`" for name in same)
        blocks.append(Text(f"Not affected by {factors_}: the same to the last digit, whatever the level."))
    return blocks


def _p(p: float) -> str:
    return "" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _name(run: Any, names: Sequence[str]) -> str:
    """What sets a run apart, in words."""
    told = [f"{name} {_level(run[name])}" for name in names if run[name] == run[name]]
    return ", ".join(told) or str(run["run"])


def _apart(runs: pd.DataFrame) -> list[str]:
    seed = seed_column(runs)
    return [*factors(runs), *([seed] if seed and runs[seed].nunique() > 1 else [])]


def _links(out: Path, folder: str, *names: str) -> list[Link]:
    """To those of a run's files that are there."""
    titles = {"notebook.ipynb": "notebook", "log.txt": "log"}
    found = [(name, Path(folder) / name) for name in names]
    return [Link(titles[name], os.path.relpath(path, out)) for name, path in found if path.is_file()]


def _failures(out: Path, runs: pd.DataFrame) -> list[Block]:
    failed = runs[runs.state == records.FAILED]
    if failed.empty:
        return []
    names = {step: _apart(_of_step(runs, step)) for step in failed.step.unique()}
    body: list[list[Cell]] = [
        [
            r["step"],
            _name(r, names[r["step"]]),
            r["error"],
            _links(out, r["folder"], "log.txt", "notebook.ipynb"),
        ]
        for r in failed.to_dict("records")
    ]
    table = Table(["step", "run", "error", "see"], body[:MOST_ROWS], max(0, len(body) - MOST_ROWS))
    again = "They are run again with `--retry-failed`."
    return [Heading("Failed"), table, Text(again, "waiting")]


def _runs(out: Path, runs: pd.DataFrame) -> list[Block]:
    import pandas as pd

    names = _apart(runs)
    body: list[list[Cell]] = []
    for run in runs.to_dict("records"):
        seen = (records.result(Path(run["folder"])) or {}).get("headline", "")
        took = "" if pd.isna(run["seconds"]) else clock(run["seconds"])
        links = _links(out, run["folder"], "notebook.ipynb", "log.txt")
        body.append([_name(run, names), run["state"], took, links, seen])
    table = Table(["run", "state", "time", "see", "what was seen"], body)
    if len(body) > FEW:
        return [OnPage([table], f"The {len(body)} runs, their notebooks and logs")]
    return [Heading("Runs", 3), table]


def _pictures(runs: pd.DataFrame) -> list[Block]:
    """Each kind of picture that the notebook makes, small, in a table of the two factors with most levels."""
    seed, names = seed_column(runs), sorted(factors(runs), key=lambda n: -runs[n].nunique())
    done = runs[runs.state == records.DONE]
    if seed is not None:
        done = done.sort_values(seed, kind="stable")
    first = done.drop_duplicates(names) if names else done.head(1)
    there = [(run, records.result(Path(run["folder"])) or {}) for run in first.to_dict("records")]
    kinds = list(dict.fromkeys(name for _, result in there for name in result.get("figures", [])))
    across, rest = (names[0], names[1:]) if names else (None, [])
    levels = list(dict.fromkeys(run[across] for run, _ in there)) if across else [""]
    blocks: list[Block] = []
    for kind in [kind for kind in kinds if kind.endswith(".png")][:MOST_KINDS]:
        grid: dict[str, dict[Any, Cell]] = {}
        captions = [result.get("captions", {}).get(kind, "") for _, result in there]
        for run, result in there[:MOST_THUMBNAILS]:
            if kind in result.get("figures", []) and (path := Path(run["folder"]) / kind).is_file():
                grid.setdefault(_name(run, rest) if rest else "", {})[run[across] if across else ""] = (
                    Thumbnail(path)
                )
        body = [[row, *(cells.get(level, "") for level in levels)] for row, cells in sorted(grid.items())]
        head = ["", *(f"{across} {_level(level)}" if across else "" for level in levels)]
        title = Path(kind).stem.replace("_", " ")
        said = [Text(captions[0])] if len(set(captions)) == 1 and captions[0] else []
        blocks += [Heading(f"Picture: {title}", 3), *said, Table(head, body)]
    if len(there) > MOST_THUMBNAILS and blocks:
        blocks.append(Text(f"Of the first {MOST_THUMBNAILS} of {len(there)} combinations.", "waiting"))
    if blocks and seed and done[seed].nunique() > 1:
        blocks.append(
            Text(f"Of {seed} {_level(done[seed].iloc[0])}; a click opens the picture whole.", "waiting")
        )
    return blocks
