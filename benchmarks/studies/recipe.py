"""Does a pretraining of two core-hours beat no pretraining? A yardstick before any factor is judged.

    python -m benchmarks.studies.recipe --out runs/studies/recipe                      # train and judge
    python -m benchmarks.studies.recipe --out runs/studies/trial --steps 600 KEY=VALUE # a trial with other settings

Pretrains on the training patients of the phantom and reads out, linearly, which organ single units are
(`units`), on patients of the validation and test splits, which neither pretraining nor readout saw. Beside stand
the same network untrained, mean and spread of HU, and the unit's place. Stopped, the same command goes on.

Written down before the judged run: the primary figure is the balanced accuracy of the teacher's tokens at stride
8 (stage 2) minus each of the three baselines; the recipe counts if all three intervals exclude zero. Second: the
same with four labelled patients, mIoU, the student, other stages, the tokens.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import smartlab as sl
from benchmarks.harness import machine
from smartlab.core.config import parse_overrides
from smartlab.core.places import code_version
from smartlab.core.settings import DataConfig
from smartlab.data.store.prepare import prepare_store
from smartlab.evaluation.judge.result import clean
from smartlab.evaluation.look.units import units

RECIPE: dict[str, Any] = {
    "data.phantom_cases": 120,
    "data.spacing": 3.0,  # a view of 64 voxels is 19 cm: context
    "data.region": 80,
    "data.view": 64,
    "data.workers": 0,
    "encoder.embed_dim": 16,
    "encoder.depths": [2, 2, 2, 2],
    "encoder.num_heads": [1, 2, 4, 8],
    "train.batch": 2,
    "train.lr": 1e-3,
    "train.warmup": 0.05,
    "train.clip": 1.0,
    "train.steps": 3000,  # about 1.1 s each on one core
    "teacher.momentum": 0.99,
    "train.checkpoint_every": 250,
    "train.picture_every": 1000,
}
PRIMARY = "stage 2/balanced accuracy"
LEVELS = ("stage 1", "stage 2", "stage 3", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/studies/recipe"))
    parser.add_argument("--steps", type=int, default=RECIPE["train.steps"])
    parser.add_argument(
        "--scans", type=int, default=32, help="to learn the readout from, and as many to judge"
    )
    parser.add_argument("--json", type=Path, help="where the result goes; default: the run's folder")
    parser.add_argument("settings", nargs="*", help="other settings than the recipe's, key=value")
    asked = parser.parse_args()
    config = sl.load_config("tiny", RECIPE | {"train.steps": asked.steps} | parse_overrides(asked.settings))
    run = sl.pretrain(config, asked.out, resume=True)
    if not run.finished:
        raise SystemExit(f"stopped at step {run.step}: run the same command again to go on")
    report: dict[str, Any] = {
        "what": __doc__.split("\n\n")[0].strip(),  # type: ignore[union-attr]
        "settings": dict(RECIPE) | {"train.steps": asked.steps} | parse_overrides(asked.settings),
        "training": spent(asked.out),
        "history": run.history.tail(5).mean(numeric_only=True).to_dict(),
        "guided": float(run.history.guided.mean()),
        "judged": judge(run, asked.scans),
        "machine": machine(),
        "code": code_version(),
    }
    path = asked.json or asked.out / "recipe.json"
    path.write_text(json.dumps(clean(report), indent=1) + "\n", encoding="utf-8")
    for name, found in report["judged"].items():
        print(f"{name:<60} {found}")


def spent(folder: Path) -> dict[str, float]:
    """Time of all its processes, from what the run wrote of itself; the threads are this process's."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in events]
    going = [event["event"] not in ("start", "resume") for event in events[1:]]  # these end a pause
    seconds = sum(b - a for a, b, on in zip(times, times[1:], going, strict=False) if on)
    return {"seconds": seconds, "core_hours": seconds * torch.get_num_threads() / 3600}


def judge(run: sl.Run, scans: int, data: DataConfig | None = None) -> dict[str, Any]:
    """Every measure of student and teacher, learned from all labelled patients, and from four."""
    _, store = prepare_store(data or run.config.data, progress=True)
    about = store.cases.drop_duplicates("image")
    learn = about.image[about.split == "train"].tolist()[:scans]
    held_out = about.image[about.split != "train"].tolist()[:scans]
    found: dict[str, Any] = {}
    for role in ("teacher", "student"):
        if role == "teacher" and not run.config.teacher.enabled:
            continue
        for labelled in (None, 4):
            with torch.inference_mode():
                result = units(run.encoder(role), store, learn + held_out, levels=LEVELS, labelled=labelled)
            prefix = role + (f", {labelled} labelled" if labelled else "")
            found |= {f"{prefix}: {name}": value for name, value in result.metrics.items()}
    return found


if __name__ == "__main__":
    main()
