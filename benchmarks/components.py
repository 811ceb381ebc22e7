"""What the plans `components` and `noise` found, as a result file that docs/EVIDENCE.md is written from.

    smartlab batch notebooks/plans/components.yaml --out runs/components
    smartlab batch notebooks/plans/components.yaml semantic=[true] seeds=5 --out runs/components   # two seeds more
    smartlab batch notebooks/plans/noise.yaml dropout=[0.0,0.3] seeds=5 --out runs/components   # the same pretrainings
    python -m benchmarks.components --runs runs/components
    python -m benchmarks.components --runs runs/again --check     # a repeat, in part or whole, beside that file

All on one commit, or nothing is shared.

Per metric: a row per arm (mean over seeds); of the arms with semantic attention the effect of noise and of masks, all
else equal, and of either at each level of the other; of semantic attention itself under random masks. `repeat` asks
whether the mean of seeds that were added later lies where the plan's own three predict it. Where the real nodules lie beside
(SMARTLAB_REAL_DATA), every pretrained encoder is probed on them too: a second, independent check.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import smartlab as sl
from benchmarks.harness import machine
from benchmarks.real_data import DATA
from smartlab.batch.results import effects, load_runs, one_metric, summarise
from smartlab.core.places import code_version
from smartlab.data.store.prepare import prepare_store
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.features.features import organ_features
from smartlab.evaluation.features.grids import scans
from smartlab.evaluation.judge.result import clean
from smartlab.evaluation.judge.stats import paired_mean, t_interval
from smartlab.evaluation.look.clusters import clusters
from smartlab.evaluation.look.heads import heads

FACTORS = ["semantic", "dropout", "strategy"]
LEVELS = ("random", "attention_high")  # the first is what the other is compared with
KEPT = {  # step -> metrics; the first is the step's primary one
    "clusters": ("features/knn_purity", "features/silhouette", "features/ratio", "ari", "nmi", "dice"),
    "probe": ("probe auc", "knn auc", "fewshot auc@5", "fewshot auc@20"),
    "attention": ("jensen_shannon", "cosine", "informativeness"),
    "localize": ("lesion/lift", "lesion/auc"),
    "pretrain": ("guided_share", "attention_informativeness", "head_diversity", "loss_amip"),
    "nodules": ("auc",),
}
LOGGED = (
    *("attention_informativeness", "head_diversity", "lift_organ", "hidden_organ", "hidden_body"),
    *("teacher_entropy", "effective_rank", "loss_amip"),
)
FIRST = 3  # seeds of the plan as it is
RESULTS = Path(__file__).parent / "results" / "components.json"
AGAIN = RESULTS.with_name("components-again.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/components"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--nodules", type=Path, default=DATA / "nodules", help="left out where there are none"
    )
    parser.add_argument(
        "--check", action="store_true", help=f"compare with {RESULTS.name}, write {AGAIN.name}"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, runs = sl.load_results(args.runs), load_runs(args.runs)
    if args.nodules.is_dir():
        table = pd.concat([table, nodules(runs[runs.step == "pretrain"], args.nodules)], ignore_index=True)
    if table.code.nunique() > 1:
        raise sl.UseError(
            "these runs are of several versions of the code", path=args.runs, fix="run both plans on one"
        )
    there = [
        (step, metric)
        for step, metrics in KEPT.items()
        for metric in metrics
        if ((table.step == step) & (table.metric == metric)).any()
    ]
    facts = {
        "runs": {step: int(n) for step, n in runs[runs.state == "done"].step.value_counts().items()},
        "failed": int((runs.state == "failed").sum()),
        "core_hours": round(float(runs.seconds.sum()) / 3600, 2),
    }
    whence = {
        "code_of_the_runs": sorted(table.code.dropna().unique()),
        "machine": machine(),
        "code": code_version(),
    }
    if args.check:
        known = json.loads(RESULTS.read_text(encoding="utf-8"))
        found = {f"{step} {metric}": ordered(table, step, metric) for step, metric in there}
        report = {**facts, **beside(found, known["metrics"]), "of": known["code_of_the_runs"], **whence}
        AGAIN.write_text(json.dumps(clean(report), indent=1) + "\n", encoding="utf-8")
        print(json.dumps(clean(report), indent=1))
        return
    report = {
        "what": "arms of the plans components and noise: means over seeds with 95% t intervals",
        **facts,
        "settings": settings(args.runs),
        "metrics": {f"{step} {metric}": measured(table, step, metric) for step, metric in there},
        "training": training(runs[(runs.step == "pretrain") & (runs.state == "done")]),
        "untrained": untrained(args.runs, args.nodules),
        **whence,
    }
    args.json.write_text(json.dumps(clean(report), indent=1) + "\n", encoding="utf-8")
    for name, found in report["metrics"].items():
        print(name, *(f"\n  {row}" for row in found["arms"] + found["effects"]))


def ordered(table: pd.DataFrame, step: str, metric: str) -> pd.DataFrame:
    """A metric's rows by arm and seed."""
    rows = one_metric(table, metric, step)
    rows = rows[[*FACTORS, "seed", "step", "metric", "value", "low", "high", "n"]]
    order = {name: place for place, name in enumerate(LEVELS)}  # effects are against the first level seen
    return rows.sort_values([*FACTORS, "seed"], key=lambda column: column.map(lambda v: order.get(v, v)))


def measured(table: pd.DataFrame, step: str, metric: str) -> dict[str, Any]:
    """Arms, effects, and effects within the levels of the other factor; the seeds' own values."""
    rows = ordered(table, step, metric)
    seeing = rows[rows.semantic == True]  # noqa: E712
    alone = effects(rows[rows.strategy == LEVELS[0]], metric)  # random masks: attention guides nothing
    alone = alone[alone.factor == "semantic"]
    later = seeing[seeing.seed >= FIRST]
    within = []
    for one in ("dropout", "strategy"):
        for level in rows[one].unique():
            part = effects(seeing[seeing[one] == level], metric)
            within += [{"where": f"{one} {level}", **row} for row in part.to_dict("records")]
    arms = summarise(rows, metric, FACTORS).drop(columns="metric")
    ends = [
        seeing[(seeing.dropout == noise) & (seeing.strategy == masks)]
        for noise, masks in ((0.3, "attention_high"), (0.0, "random"))
    ]
    pairs = ends[0].merge(ends[1], on="seed", suffixes=("", "_neither"))
    enough = len(pairs) > 1
    both = paired_mean(pairs.value, pairs.value_neither, pairs.seed.to_numpy())._asdict() if enough else None
    return {
        "patients": int(rows.n.max()) if rows.n.notna().any() else None,
        "both_minus_neither": both,
        "arms": arms.to_dict("records"),
        "effects": effects(seeing, metric).to_dict("records"),
        "planned": effects(seeing[seeing.seed < FIRST], metric).to_dict("records"),
        "later": effects(later, metric).to_dict("records") if len(later) else [],
        "semantic": alone.drop(columns="p").to_dict("records"),
        "within": within,
        "repeat": [row for arm, cell in rows.groupby(FACTORS) if (row := repeat(cell, arm))],
        "each": rows[[*FACTORS, "seed", "value"]].to_dict("records"),
    }


def repeat(cell: pd.DataFrame, arm: tuple[Any, ...]) -> dict[str, Any] | None:
    """Of an arm with later seeds: where 95% of means of as many seeds would lie by the first ones, and their mean."""
    cell = cell[cell.value.notna()]
    first, later = cell[cell.seed < FIRST].value, cell[cell.seed >= FIRST].value
    if later.empty or len(first) < 2:
        return None
    mean, low, high, n = t_interval(first.to_numpy())
    half = (high - low) / 2 * math.sqrt(1 + n / len(later))  # of a mean still to come, not of the true one
    found = {"first": mean, "low": mean - half, "high": mean + half}
    found |= {"later": float(later.mean()), "n_later": len(later)}
    return {
        **dict(zip(FACTORS, arm, strict=True)),
        **found,
        "within": bool(abs(found["later"] - mean) <= half),
    }


def beside(found: dict[str, pd.DataFrame], known: dict[str, Any]) -> dict[str, Any]:
    """A repeat beside what is known: values of a seed that are the same, means of an arm inside its interval."""
    same, means, outside = [], [], []
    for name, rows in found.items():
        known_values = pd.DataFrame(known[name]["each"])
        pairs = rows.merge(known_values, on=[*FACTORS, "seed"], suffixes=("", "_known"))
        pairs = pairs.dropna(subset=["value", "value_known"])
        same += (pairs.value == pairs.value_known).tolist()
        arms = pd.DataFrame(known[name]["arms"])
        new = rows.groupby(FACTORS, as_index=False).value.mean()
        new = new.merge(arms, on=FACTORS, suffixes=("", "_known")).dropna(subset=["value", "low", "high"])
        inside = new.value.between(new.low, new.high)
        means += inside.tolist()
        outside += [{"metric": name, **row} for row in new[~inside].to_dict("records")]
    return {
        "values": len(same),
        "the_same": sum(same),
        "means": len(means),
        "inside": sum(means),
        "outside": outside,
    }


def nodules(pretrained: pd.DataFrame, root: Path) -> pd.DataFrame:
    """A row per pretrained encoder: AUC of a linear probe on the real nodules."""
    rows = []
    for _, run in pretrained[pretrained.state == "done"].iterrows():
        own = {name: run[name] for name in (*FACTORS, "seed")}
        found = real_nodules(Path(run.folder) / "run", root)
        rows.append({**own, "step": "nodules", "metric": "auc", **found})
    return pd.DataFrame(rows)


def training(pretrained: pd.DataFrame) -> list[dict[str, Any]]:
    """What the logs say, by arm and quarter of the steps, means over seeds."""
    logs = []
    for _, run in pretrained.iterrows():
        log = sl.Run(Path(run.folder) / "run").history
        log["quarter"] = (4 * (log.step - 1) / log.step.max()).astype(int) + 1
        known = [name for name in LOGGED if name in log]
        means = log.groupby("quarter")[known].mean().reset_index()
        logs.append(means.assign(**{name: run[name] for name in FACTORS}))
    return pd.concat(logs).groupby([*FACTORS, "quarter"], as_index=False).mean().to_dict("records")


def untrained(folder: Path, root: Path) -> dict[str, list[float]]:
    """The encoder with semantic attention and random weights, seeds 0 to 2, on the same scans: beside the arms."""
    config = sl.Run(first_run(folder)).config
    man, store = prepare_store(config.data, progress=False)
    known = scans(store)
    images = known[known.split == "test"].image.tolist()[:16]  # as the plan says
    found: dict[str, list[float]] = {
        name: [] for name in ("clusters features/knn_purity", "attention jensen_shannon", "nodules auc")
    }
    for seed in range(3):
        encoder = random_encoder(config, seed)
        table = organ_features(encoder, store, man, images=images)
        purity = clusters(table, embeddings=(), draws=20).metrics["features/knn_purity"]
        found["clusters features/knn_purity"].append(purity.value)
        alike = heads(encoder, store, images=images, views=2, noise=0, draws=20, progress=False)
        found["attention jensen_shannon"].append(alike.metrics["jensen_shannon"].value)
        if root.is_dir():
            found["nodules auc"].append(real_nodules(encoder, root)["value"])
    return found


def real_nodules(encoder: Any, root: Path) -> dict[str, float]:
    """AUC of a linear probe on the real nodules."""
    where = {"label": "malignancy", "root": root, "beside": False, "progress": False}
    return sl.evaluate(encoder, "probe", "nodules-png", **where).metrics["auc"]._asdict()


def first_run(folder: Path) -> Path:
    """A pretraining with semantic attention."""
    return next(run for run in sorted(folder.glob("pretrain/*/run")) if sl.Run(run).config.semantic.enabled)


def settings(folder: Path) -> dict[str, Any]:
    """Of the pretrainings: what is the same in all of them."""
    first = sl.Run(first_run(folder)).config
    return {
        "steps": first.train.steps,
        "views_per_step": 2 * first.train.batch,
        "view": first.data.view,
        "phantoms": first.data.phantom_cases,
        "ratio": first.mask.ratio,
        "threshold": first.mask.informativeness,
    }


if __name__ == "__main__":
    main()
