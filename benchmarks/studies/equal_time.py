"""A plain vision transformer beside Swin, for the same time on one core: `primus-tiny` and `tiny` on phantoms.

    python -m benchmarks.studies.equal_time --out runs/studies/equal_time --minutes 12

Three arms, each the presets' own settings but for the data: Swin as `tiny` (DAGMaN), `primus-tiny` by masked
autoencoding with hidden patches left out, and `primus-tiny` by DAGMaN, its masks guided by its own [CLS]. Steps are as
many as fit into the time of the processor: a few are timed first, so that schedules end where the time does; what
a training took in the end stands in the result. Judged on patients held out, beside the same
network untrained: linear probe of organs, clusters of organs, attention on lesions, nodules.

Written down before it ran: no prediction which is better. Primary: organ probe, each Primus minus Swin, paired by patient.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import smartlab as sl
from benchmarks.harness import machine
from benchmarks.shipped import judged, told
from smartlab.core.files import write_text
from smartlab.core.places import code_version
from smartlab.evaluation.judge.result import Result, clean

DATA = {
    "data.phantom_cases": 120,
    "data.spacing": 2.0,
    "data.region": 80,
    "data.view": 64,
    "data.window": [-1000, 400],
    "data.workers": 0,
    "train.checkpoint_every": 500,
    "train.picture_every": 10**6,
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin, dagman": ("tiny", {}),
    "primus, mae": ("primus-tiny", {}),
    "primus, dagman": ("primus-tiny", {"method.preset": "dagman"}),
}
RESULTS = Path(__file__).parents[1] / "results" / "equal_time.json"
TIMED = 60  # steps, after as many that are not


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12, help="of each pretraining, on one core")
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"what": (__doc__ or "").split("\n\n")[0], "minutes": asked.minutes, "arms": {}}
    results: dict[str, dict[str, Result]] = {}
    for arm, (preset, more) in ARMS.items():
        run, seconds = pretrained(arm, preset, DATA | more, asked)
        role = "teacher" if run.config.teacher.enabled else "student"
        patients, found = judged(run.encoder(role), run.config)
        report |= {"held_out_patients": patients}
        report["arms"][arm] = {
            "steps": run.step,
            "cpu_minutes": seconds / 60,
            "tasks": {name: told(result) for name, result in found.items()},
        }
        for name, result in found.items():
            results.setdefault(name, {})[arm] = result
    report["compared"] = {
        task: sl.compare(arms, task).to_dict("records")
        for task, arms in results.items()
        if task != "clusters"
    }
    report |= {"machine": machine(), "code": code_version()}
    asked.json.write_text(json.dumps(clean(report), indent=1) + "\n", encoding="utf-8")
    for arm, one in report["arms"].items():
        print(
            arm, one["steps"], *(f"\n  {t} {n}: {v}" for t, f in one["tasks"].items() for n, v in f.items())
        )


def pretrained(
    arm: str, preset: str, settings: dict[str, Any], asked: argparse.Namespace
) -> tuple[sl.Run, float]:
    """A run of as many steps as fit into the time, and how many seconds of a processor it took."""
    out, took = asked.out / arm.replace(", ", "-"), []
    if not (kept := out / "seconds.json").is_file():
        for steps in (1, TIMED, 2 * TIMED, 0):  # the first prepares what is prepared once
            shutil.rmtree(out, ignore_errors=True)
            steps = steps or int(asked.minutes * 60 * TIMED / (took[2] - took[1]))
            start = time.process_time()
            sl.pretrain(
                sl.load_config(preset, settings | {"train.steps": steps}), out, progress=steps > 2 * TIMED
            )
            took.append(time.process_time() - start)
        write_text(kept, json.dumps(took[-1]))
    return sl.Run(out), json.loads(kept.read_text("utf-8"))


if __name__ == "__main__":
    main()
