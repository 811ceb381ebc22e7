"""The results of a batch as one tidy table: parameters, metric, value and interval, one row per run and metric."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.batch import records
from smartlab.core.errors import DataError, UseError, unknown
from smartlab.core.files import whole

if TYPE_CHECKING:
    import pandas as pd

FACTS = ("step", "run", "state", "error", "seconds", "attempt", "smoke", "code", "data", "folder")
ESTIMATE = ("metric", "value", "low", "high", "n")
NOT_COMPARED = {*FACTS, *ESTIMATE, "seed", "out", "workers"}


def load_runs(out: str | Path) -> pd.DataFrame:
    """One row per run, failed ones too: its parameters and those of the runs it builds on, and FACTS.

    A parameter is a column under its own name where all steps that have it agree in every run, else one
    column per step (`probe.seed`). References to other runs are left out.
    """
    return _load(Path(out))[0]


def load_results(out: str | Path) -> pd.DataFrame:
    """One row per run and metric: parameters, `metric`, `value`, `low`, `high`, `n`, and where it came from.

    Without an interval `low` and `high` are not-a-number; failed runs are in `load_runs`.

    >>> table = sl.load_results("runs/components")
    >>> table[table.metric == "auc"].groupby("strategy").value.mean()
    """
    import pandas as pd

    runs, metrics = _load(Path(out))
    if not metrics:
        raise DataError(
            "holds no results",
            path=out,
            found=f"{len(runs)} runs",
            fix="run a batch there: `smartlab batch PLAN --out DIR`",
        )
    listed = pd.DataFrame(metrics, columns=["run_number", *ESTIMATE])
    kept = runs.drop(columns=["state", "error", "attempt"])
    table = kept.join(listed.set_index("run_number"), how="inner").reset_index(drop=True)
    facts = [name for name in FACTS if name in table and name not in ("step", "run")]
    first = ["step", "run"]
    middle = [name for name in table if name not in {*first, *facts, *ESTIMATE}]
    return table[[*first, *middle, *ESTIMATE, *facts]]


def _load(out: Path) -> tuple[pd.DataFrame, list[tuple[Any, ...]]]:
    import pandas as pd

    if not out.is_dir():
        raise UseError("no such folder of results", path=out)
    every = {os.path.relpath(f, out): r for f in _candidates(out) if (r := _record(f))}
    found = _newest(every)
    rows, metrics = [], []
    parameters = _columns({name: _chain(name, every) for name in found})  # what it was built on may be old
    for number, (name, record) in enumerate(found.items()):
        result = record.get("result", {})
        facts = {
            "step": record["step"],
            "run": Path(name).name,
            "state": record["state"],
            "error": record.get("error") or "",
            "seconds": record.get("seconds"),
            "attempt": record.get("attempt", 1),
            "smoke": result.get("smoke"),
            "code": record.get("code"),
            "data": result.get("data") or record.get("data"),
            "folder": str(out / name),
        }
        rows.append({**facts, **parameters[name]})
        metrics += [(number, *estimate) for estimate in _estimates(result.get("metrics", {}))]
    return pd.DataFrame(rows, columns=None if rows else list(FACTS)), metrics


def _candidates(out: Path) -> list[Path]:
    """Runs of a batch, two folders deep, and single notebooks' folders, one deep."""
    single = [p.parent for p in sorted(out.glob("*/result.json"))]
    return [*records.folders(out), *single]


def _newest(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of runs with the same parameters and data but another source of smartlab, the last one."""
    last: dict[tuple[str, str], str] = {}
    for name, record in found.items():
        same = (record["step"], record.get("identity", name))
        if same not in last or record.get("started", "") >= found[last[same]].get("started", ""):
            last[same] = name
    return {name: found[name] for name in last.values()}


def _record(folder: Path) -> dict[str, Any]:
    """The record of a run with its result; a notebook that was run by hand has only the result."""
    record = records.read(folder)
    if record and record["state"] != records.DONE:  # its result may be half written
        return record
    result = records.result(folder)
    if result is None:
        if (folder / "result.json").exists():
            warnings.warn(f"{folder / 'result.json'}: is no result and left out", stacklevel=2)
        return record
    if not record:
        if not {"step", "parameters", "metrics"} <= result.keys():
            return {}
        facts = {"step": result["step"], "state": records.DONE, "settings": result["parameters"]}
        return {**facts, "code": result.get("code"), "result": result, "upstream": {}}
    return record | {"result": result}


def _chain(name: str, found: Mapping[str, dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """(step, parameter) -> value of a run and of all it builds on."""
    record = found.get(str(name), {})
    values: dict[tuple[str, str], Any] = {}
    for above in (record.get("upstream") or {}).values():
        values |= _chain(above, found)
    for parameter, value in (record.get("settings") or {}).items():
        try:
            plain = value.format() if isinstance(value, str) else value  # {{ is a brace that was meant
        except (LookupError, ValueError):  # {pretrain}: a reference to another run
            continue
        if parameter != "out":
            values[record["step"], parameter] = plain
    return values


def _columns(chains: Mapping[str, dict[tuple[str, str], Any]]) -> dict[str, dict[str, Any]]:
    """Short names for parameters on which the steps of each run agree."""
    disagree = set()
    for chain in chains.values():
        seen: dict[str, Any] = {}
        for (_, parameter), value in chain.items():
            if seen.setdefault(parameter, value) != value:
                disagree.add(parameter)
    taken = {*FACTS, *ESTIMATE}  # a parameter called `n` must not replace the count of patients
    return {
        name: {f"{s}.{p}" if p in disagree or p in taken else p: v for (s, p), v in chain.items()}
        for name, chain in chains.items()
    }


def _estimates(metrics: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """(metric, value, low, high, n) of every number; words are no metrics."""
    found = []
    for name, value in metrics.items():
        one = value if isinstance(value, dict) else {"value": value}
        numbers = [one.get(part) for part in ("value", "low", "high", "n")]
        if "value" in one and all(isinstance(v, (int, float, type(None))) for v in numbers):
            found.append((name, *(math.nan if v is None else float(v) for v in numbers)))
    return found


def export_results(table: pd.DataFrame, path: str | Path) -> Path:
    """Write the table as .csv or .parquet."""
    path = Path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise UseError("unknown format of results", path=path, expected=".csv or .parquet")
    with whole(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
            return path
        plain = table.copy()
        for name in plain:  # a parameter that is a number here and a word there
            if plain[name].dtype == object and plain[name].map(type).nunique() > 1:
                plain[name] = plain[name].map(lambda v: None if v is None else str(v))
        try:
            plain.to_parquet(temporary, index=False)
        except ImportError:
            raise UseError(
                "Parquet needs pyarrow", path=path, fix="pip install pyarrow, or export .csv"
            ) from None
    return path


def factors(table: pd.DataFrame) -> list[str]:
    """The parameters that vary in a table, seeds left out."""
    names = [
        str(name)
        for name in table
        if name not in NOT_COMPARED and not str(name).endswith((".seed", ".workers"))
    ]
    return [name for name in names if table[name].astype(str).nunique() > 1]


def seed_column(table: pd.DataFrame) -> str | None:
    """The column that tells repetitions apart: the seed that varies."""
    named = [str(n) for n in table if (n == "seed" or str(n).endswith(".seed")) and table[n].notna().any()]
    return next((name for name in named if table[name].nunique() > 1), named[0] if named else None)


def unaffected(rows: pd.DataFrame) -> list[str]:
    """The factors that change nothing in one metric: it is the same, to the last digit, whatever their level.

    Compared are runs that agree in every other factor and in the seed.
    """
    names, seed = factors(rows), seed_column(rows)
    found, rows = [], rows[rows.value.notna()]
    for factor in names:
        others = [name for name in names if name != factor] + ([seed] if seed else [])
        cells = [part for _, part in rows.groupby(others, dropna=False)] if others else [rows]
        compared = [part.value for part in cells if part[factor].astype(str).nunique() > 1]
        if compared and all(values.nunique() == 1 for values in compared):
            found.append(factor)
    return found


def one_metric(table: pd.DataFrame, metric: str, step: str | None = None) -> pd.DataFrame:
    """The rows of one metric; with its name misspelt or in two steps, an error that says so."""
    rows = table[table.metric == metric]
    rows = rows if step is None else rows[rows.step == step]
    if rows.empty:
        raise unknown("no metric", metric, sorted(table.metric.unique()))
    if rows.step.nunique() > 1:
        raise UseError(
            f"several steps have {metric!r}", found=", ".join(rows.step.unique()), fix="say which step"
        )
    return rows


def summarise(
    table: pd.DataFrame, metric: str, by: Sequence[str] | None = None, step: str | None = None
) -> pd.DataFrame:
    """Mean and 95% interval of a metric for each combination of `by` (default: all that varies).

    With several seeds the interval is that of the mean over seeds (t), after averaging within each seed
    over whatever else varies. One run alone keeps its own interval, over patients. `over` says which.
    """
    import pandas as pd

    from smartlab.evaluation.judge.stats import t_interval

    rows = one_metric(table, metric, step)
    rows = rows[rows.value.notna()]
    by = list(factors(rows)) if by is None else list(by)
    if lacking := [name for name in by if name not in rows]:
        raise unknown("no parameter", lacking[0], factors(rows), " in these results")
    seed = seed_column(rows)
    found = []
    estimate: tuple[Any, ...]
    for names, cell in rows.groupby(by, sort=False, dropna=False) if by else [((), rows)]:
        level = dict(zip(by, names, strict=True))
        means = cell.groupby(seed).value.mean() if seed else cell.value
        if len(means) > 1:
            estimate, over = tuple(t_interval(means.to_numpy())), "seeds"
        elif len(cell) == 1:
            one = cell.iloc[0]
            estimate, over = (
                (one.value, one.low, one.high, one.n),
                "none" if math.isnan(one.low) else "patients",
            )
        else:
            estimate, over = (means.iloc[0], math.nan, math.nan, 1), "none"
        found.append(
            {
                **level,
                "metric": metric,
                **dict(zip(("value", "low", "high", "n"), estimate, strict=True)),
                "over": over,
            }
        )
    return pd.DataFrame(found)


def effects(table: pd.DataFrame, metric: str, step: str | None = None) -> pd.DataFrame:
    """Each level of each factor minus the factor's first level, all else equal.

    Pairs agree in every other factor and in the seed. The test is a t-test in which a seed counts once,
    however many pairs it has; p-values are Holm's over the table. Needs two seeds. A factor that the metric
    is `unaffected` by is not tested: its differences are 0 and have no p.
    """
    import pandas as pd

    from smartlab.evaluation.judge.stats import holm, paired_mean

    rows = one_metric(table, metric, step)
    names, seed, found, same = factors(rows), seed_column(rows), [], unaffected(rows)
    rows = rows[rows.value.notna()]
    if seed is None or rows[seed].nunique() < 2:
        return pd.DataFrame(columns=["factor", "level", "against", "value", "low", "high", "p", "n"])
    for factor in names:
        others = [name for name in names if name != factor] + [seed]
        levels = list(dict.fromkeys(rows[factor]))
        first = rows[rows[factor] == levels[0]]
        for level in levels[1:]:
            pairs = rows[rows[factor] == level].merge(first, on=others, suffixes=("", "_first"))
            if pairs[seed].nunique() < 2:
                continue
            difference = paired_mean(pairs.value, pairs.value_first, pairs[seed].to_numpy())
            found.append({"factor": factor, "level": level, "against": levels[0], **difference._asdict()})
    listed = pd.DataFrame(found, columns=["factor", "level", "against", "value", "low", "high", "p", "n"])
    listed["p"] = holm(listed.p.where(~listed.factor.isin(same)).to_numpy(float))
    return listed
