"""Make the small encoders that come with the package: one pretraining, exported as student and teacher.

    python -m benchmarks.shipped --out runs/shipped            # ten minutes on one core
    python -m benchmarks.shipped --out runs/shipped --keep     # judge it, leave smartlab/weights as they are

Judged beside an untrained encoder on phantoms whose patients are in the validation and test splits, which
pretraining never saw: a linear probe for organs, clusters of organs, and attention on lesions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

import smartlab as sl
from benchmarks.harness import machine
from smartlab.core.places import WEIGHTS, code_version
from smartlab.data.store.prepare import prepare_store
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.features.features import lesion_features, organ_features
from smartlab.evaluation.judge.result import Result, clean
from smartlab.evaluation.learn.probe import probe
from smartlab.evaluation.look.clusters import clusters
from smartlab.evaluation.look.localize import localize

RECIPE = {
    "data.phantom_cases": 240,
    "data.workers": 0,
    "data.view": 32,
    "data.region": 48,
    "train.batch": 8,
    "train.lr": 2e-4,
    "train.steps": 1500,
    "teacher.momentum": 0.98,
    "train.checkpoint_every": 500,
    "train.picture_every": 100_000,  # none
}
ROLES = ("teacher", "student")
RESULTS = Path(__file__).parent / "results" / "shipped.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/shipped"))
    parser.add_argument("--keep", action="store_true", help="do not replace the weights of the package")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = sl.load_config("tiny", RECIPE)
    run = sl.pretrain(config, args.out, resume=True)
    folder = args.out / "exported" if args.keep else WEIGHTS
    if args.keep and args.json == RESULTS:
        args.json = args.out / "judged.json"
    files = {r: sl.export(args.out, "safetensors", folder / f"tiny-{r}.safetensors", role=r) for r in ROLES}
    report = {
        "what": "the shipped teacher beside an untrained encoder, on patients that pretraining did not see",
        "recipe": {"preset": "tiny", **RECIPE},
        "tensors": {role: tensors(file) for role, file in files.items()},
        **judge(sl.load_encoder(files["teacher"]), run.config),
        "machine": machine(),
        "code": code_version(),
    }
    args.json.write_text(json.dumps(clean(report), indent=1) + "\n", encoding="utf-8")
    for task, found in report["tasks"].items():
        print(task, *(f"\n  {name}: {value}" for name, value in found.items()))


def tensors(file: Path) -> str:
    """A name for the numbers in a file, whatever else it tells."""
    found = hashlib.sha256()
    for name, value in sorted(load_file(file).items()):
        found.update(name.encode() + value.tobytes())
    return found.hexdigest()[:16]


def judge(teacher: Any, config: sl.Config) -> dict[str, Any]:
    """Every task on the held-out patients: value, low, high, n."""
    images, tasks = judged(teacher, config)
    return {"held_out_patients": images, "tasks": {name: told(result) for name, result in tasks.items()}}


def judged(teacher: Any, config: sl.Config) -> tuple[int, dict[str, Result]]:
    """How many held-out patients there are, and the result of every task on them."""
    untrained = random_encoder(config)
    man, store = prepare_store(config.data, progress=False)
    cases = store.cases[store.cases.split.isin(["val", "test"])]
    images = sorted({int(i) for i in cases.image})
    both = [organ_features(e, store, man, images=images) for e in (teacher, untrained)]
    keys = [*cases.index[cases.center_mm.notna()]]
    lesions = [lesion_features(e, store, man, pooling="center", cases=keys) for e in (teacher, untrained)]
    return len(images), {
        "organ probe": probe(both[0], "organ", split="cross", beside={"random encoder": both[1]}),
        "clusters": clusters(both[0], beside={"random": both[1]}, embeddings=()),
        "nodule probe": probe(lesions[0], "malignancy", split="cross", beside={"random encoder": lesions[1]}),
        "localize": localize(teacher, store, images=images),
    }


def told(result: Result) -> dict[str, list[float]]:
    return {
        name: [round(v, 4) for v in (e.value, e.low, e.high)] + [e.n]
        for name, e in result.metrics.items()
        if ":head" not in name
    }


if __name__ == "__main__":
    main()
