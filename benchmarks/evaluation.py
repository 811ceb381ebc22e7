"""What evaluation costs once features exist: CPU seconds of every task on 5,000 lesions × 768 features.

Promised: everything under a minute on two cores. Measured as CPU time of the process, which other work on
the machine hardly changes, as time on the clock, and the highest resident memory. outcome is for cohorts of patients: 200, with
a thousand-fold bootstrap, beside its concordance on 5,000.

    python -m benchmarks.evaluation
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.harness import machine
from smartlab.core.places import code_version
from smartlab.data.cohort.case import LabelSpec
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge import metrics, stats
from smartlab.evaluation.judge.compare import compare
from smartlab.evaluation.learn.fewshot import fewshot
from smartlab.evaluation.learn.outcome import outcome
from smartlab.evaluation.learn.probe import knn, probe
from smartlab.evaluation.look.clusters import clusters

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
SITES = [f"organ {i}" for i in range(10)]


def cohort(rows: int, width: int, patients: int, seed: int = 0) -> FeatureTable:
    """Correlated features as encoders give them (a few directions carry most), labels that follow a part."""
    r = np.random.default_rng(seed)
    hidden = r.normal(size=(rows, 40))
    x = hidden @ r.normal(size=(40, width)) + 0.5 * r.normal(size=(rows, width))
    who = np.sort(r.integers(0, patients, rows))
    who[:patients] = np.arange(patients)
    seen = hidden[:, :4] + r.normal(size=(rows, 4))
    per_patient = hidden[np.unique(who, return_index=True)[1], 0][who]
    event_at = np.exp(1 - 0.7 * per_patient + 0.3 * r.normal(size=patients)[who])
    about = pd.DataFrame(
        {
            "case": [f"c{i}" for i in range(rows)],
            "patient": [f"p{i}" for i in who],
            "image": 0,
            "split": None,
            "fold": None,
            "label:malignancy": np.where(seen[:, 0] > 0.4, "malignant", "benign"),
            "label:grade": np.digitize(seen[:, 1], [-1, 0.5]).astype(str),
            "label:margin": [["abc"[i] for i in np.flatnonzero(row > 0.5)] for row in seen[:, :3]],
            "label:organ": [SITES[i] for i in np.digitize(hidden[:, 3], np.linspace(-1.6, 1.6, 9))],
            "label:response": np.where(per_patient > 0, "yes", "no"),
            "label:months": np.minimum(event_at, 4.0),
            "label:progressed": (event_at < 4.0).astype(float),
        }
    )
    specs = {
        "malignancy": LabelSpec(kind="binary", classes=["benign", "malignant"]),
        "grade": LabelSpec(kind="multiclass", classes=["0", "1", "2"]),
        "margin": LabelSpec(kind="multilabel", classes=["a", "b", "c"]),
        "organ": LabelSpec(kind="multiclass", classes=SITES),
        "response": LabelSpec(kind="binary", classes=["no", "yes"]),
        "months": LabelSpec(kind="time", unit="months"),
        "progressed": LabelSpec(kind="event"),
    }
    return FeatureTable(x.astype(np.float32), about, specs, {"encoder": "made up"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", help="names that contain one of these")
    args = parser.parse_args()
    table, small = cohort(args.rows, 768, args.rows // 2), cohort(400, 768, 200)
    truth, score = table.labelled("malignancy")[1], table.x[:, 0].astype(float)
    who = table.about.patient.to_numpy()
    time_to, seen = (table.about[f"label:{n}"].to_numpy(float) for n in ("months", "progressed"))
    run = probe(table, "malignancy", draws=100).table if not args.only else None
    tasks: dict[str, Callable[[], Any]] = {
        "2,000 bootstraps of AUC": lambda: stats.bootstrap(
            lambda t, s: {"auc": metrics.auc(t, s)}, who, truth, score, draws=2000
        ),
        "AUC by DeLong": lambda: stats.mean_area(
            stats.areas(truth == 1, *stats.in_order(truth == 1, score[None]), who)
        ),
        "concordance": lambda: metrics.in_order(time_to, seen == 1, score),
        "probe, binary": lambda: probe(table, "malignancy"),
        "probe, 3 classes": lambda: probe(table, "grade"),
        "probe, 3 labels": lambda: probe(table, "margin"),
        "knn": lambda: knn(table, "malignancy"),
        "fewshot, 50 draws": lambda: fewshot(table, "malignancy"),
        "clusters, UMAP of 3 seeds, PCA and t-SNE": lambda: clusters(table),
        "compare two runs": lambda: compare({"a": run, "b": run}, "probe"),
        "outcome of 200 patients, 20 repeats": lambda: outcome(small, "response"),
        "follow-up of 200 patients, 20 repeats": lambda: outcome(small, "months"),
    }
    report: dict[str, Any] = {
        "what": f"CPU seconds, and seconds, of a task on {args.rows:,} × 768 features that exist already",
        "patients": table.about.patient.nunique(),
        "cpu_seconds": {},
        "seconds": {},
    }
    for name, task in tasks.items():
        if args.only and not any(word in name for word in args.only):
            continue
        start, began = time.process_time(), time.monotonic()
        task()
        report["cpu_seconds"][name] = round(time.process_time() - start, 2)
        report["seconds"][name] = round(time.monotonic() - began, 2)
        print(f"{name}: {report['seconds'][name]} s, CPU {report['cpu_seconds'][name]} s", flush=True)
    unit = 1 if sys.platform == "darwin" else 1024
    report["peak_memory_gb"] = round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2
    )  # all tasks and both tables together
    report |= {"machine": machine(), "code": code_version()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
