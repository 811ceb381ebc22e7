"""One encoder through every downstream task on real images (too few to quote) and on the phantom.

    nodules   ../shared/data/nodules through probe, knn and fewshot, the largest area and others beside
    sarcoma   ct_sarcoma through localize and finetune segment; predictions checked against the sources
    organs    the one scan of ct_organs through clusters and unsupervised
    phantom   phantom-ct through every task, outcome with binary and time-to-event labels

Numbers are written as they are. The data lie where SMARTLAB_REAL_DATA says (../shared/data).

    python -m benchmarks.real_data --encoder runs/attention
    python -m benchmarks.real_data --encoder random --only sarcoma --scans 4 --steps 4
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

import smartlab as sl
from benchmarks.harness import machine
from benchmarks.shipped import tensors
from smartlab.core.config import load_config
from smartlab.core.errors import SmartlabError
from smartlab.core.places import code_version
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.evaluation.features.encoders import as_encoder, random_encoder
from smartlab.evaluation.features.tokens import organ_tokens
from smartlab.evaluation.judge.result import Result, clean
from smartlab.evaluation.look.clusters import clusters
from smartlab.evaluation.look.unsupervised import unsupervised

HERE = Path(__file__).parent
DATA = Path(os.environ.get("SMARTLAB_REAL_DATA", HERE.parents[1] / "shared" / "data"))
RESULTS = HERE / "results" / "real_data.json"
KEPT = ("cases", "patients", "split", "notes", "failed", "cut", "images", "with_region", "n", "spacing_mm")
WHOLE = ("clusters", "unsupervised", "heads", "localize", "segment")
Tasks = dict[str, Callable[[], "Result | dict[str, Any]"]]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    source: Any = args.encoder if args.encoder != "random" else random_encoder(load_config("tiny"))
    encoder, facts = as_encoder(source)
    if str(source).endswith(".safetensors"):
        facts = facts | {"tensors": tensors(Path(source))}
    sections = {
        "nodules": lambda: nodules(source, args),
        "sarcoma": lambda: sarcoma(encoder, args),
        "organs": lambda: organs(encoder, args),
        "phantom": lambda: phantom(source, args),
    }
    report: dict[str, Any] = {
        "what": "every task on real images and the phantom, numbers as they are: too few to quote",
        "encoder": facts,
        "settings": {
            "steps": args.steps,
            "scans": args.scans,
            "phantom_cases": args.phantom_cases,
            "phantom_scans": args.phantom_scans,
        },
    }
    if args.only and args.json.is_file():  # keep what was found for the others
        report = json.loads(args.json.read_text(encoding="utf-8")) | report
    failed = 0
    for name in args.only or sections:
        report[name] = {}
        for task, run in sections[name]().items():
            if task in args.skip:
                continue
            report[name][task] = found = measured(run)
            failed += "error" in found
            print(f"{name} {task}: {found['cpu_seconds']} s  {headline(found)}", flush=True)
            write(args.json, report)
    report |= {"machine": machine(), "code": code_version()}
    write(args.json, report)
    raise SystemExit(1 if failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="run, exported file, or random")
    parser.add_argument("--out", type=Path, default=Path("runs/real-data"))
    parser.add_argument(
        "--only",
        nargs="*",
        choices=["nodules", "sarcoma", "organs", "phantom"],
        help="the others stay as they are",
    )
    parser.add_argument("--skip", nargs="*", default=[], help="tasks to leave out, such as segment overlay")
    parser.add_argument("--steps", type=int, default=120, help="of each fine-tuning")
    parser.add_argument("--scans", type=int, default=24, help="sarcoma scans, all 24 by default")
    parser.add_argument("--phantom-cases", type=int, default=60, help="for tasks on lesions")
    parser.add_argument("--phantom-scans", type=int, default=12, help="for tasks on whole scans")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def measured(run: Callable[[], Result | dict[str, Any]]) -> dict[str, Any]:
    """What a task found, its CPU seconds, or why it could not be done."""
    start = time.process_time()
    try:
        found = run()
    except SmartlabError as error:
        found = {"error": str(error)}
    if isinstance(found, Result):
        values = {
            name: [round(v, 4) for v in (e.value, e.low, e.high)] + [e.n]
            for name, e in found.metrics.items()
            if ":" not in name or name.split(":")[1] in ("centre", "random", "body")
        }
        facts = {key: found.facts[key] for key in KEPT if key in found.facts}
        found = facts | {"metrics": values}
    return clean({"cpu_seconds": round(time.process_time() - start, 1), **found})


def headline(found: dict[str, Any]) -> str:
    """The first score, to watch."""
    name, value = next(iter(found.get("metrics", {}).items()), ("", found.get("error", "")))
    return f"{name} {value}"


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def nodules(source: Any, args: argparse.Namespace) -> Tasks:
    """531 nodules of a folder of PNG stacks: by patient folds, beside areas, volumes and a random encoder."""

    def of(task: str, **settings: Any) -> Callable[[], Result]:
        where = {"root": DATA / "nodules", "out": args.out / f"nodules-{task}"}
        return lambda: sl.evaluate(source, task, "nodules-png", label="malignancy", **where, **settings)

    return {"probe": of("probe"), "knn": of("knn"), "fewshot": of("fewshot", draws=30)}


def sarcoma(encoder: Any, args: argparse.Namespace) -> Tasks:
    """Attention on the tumours of all scans; segmentation learned on five patients of eight."""
    ids = sorted(folder.name for folder in (DATA / "ct_sarcoma").glob("STS_*"))[: args.scans]
    parts = ("train", "train", "test", "train", "val", "train", "test", "train")
    cases = [
        Case(
            id=name,
            patient=name,
            image=f"ct_sarcoma/{name}/CT_image.nii.gz",
            masks={"tumour": f"ct_sarcoma/{name}/CT_mask.nii.gz"},
            split=parts[place % len(parts)],
        )
        for place, name in enumerate(ids)
    ]
    man = manifest("sarcoma", cases)
    store = _store(man, encoder, args.out / "sarcoma-store")
    folder = args.out / f"sarcoma-segment-{args.steps}"
    common = {"store": store, "root": DATA}

    def segment() -> Result:
        settings = {"steps": args.steps, "validate_every": max(1, args.steps // 4), "resume": True}
        modes = ("full", "scratch")
        return sl.evaluate(encoder, "segment", man, out=folder, modes=modes, **common, **settings)

    def localize() -> Result:
        out = args.out / "sarcoma-localize"
        return sl.evaluate(encoder, "localize", man, images=range(len(store)), out=out, **common)

    def check() -> dict[str, Any]:
        keys = {case.id: store.rows[int(store.cases.image[store.key_of(case)])]["key"] for case in cases}
        written = folder / "full-100pct" / "predictions"
        return overlay({DATA / "ct_sarcoma" / n: written / f"{key}.nii.gz" for n, key in keys.items()})

    return {"localize": localize, "segment": segment, "overlay": check}


def overlay(predictions: dict[Path, Path]) -> dict[str, Any]:
    """Predictions against the files they were made from: grids, and tumours in world coordinates (mm)."""
    rows = []
    for source, path in predictions.items():
        if not path.is_file():  # not a test scan
            continue
        image, mask, said = (
            nib.load(f) for f in (source / "CT_image.nii.gz", source / "CT_mask.nii.gz", path)
        )
        truth, found = np.asarray(mask.dataobj) > 0, np.asarray(said.dataobj) > 0
        middles = [_middle(found, said.affine), _middle(truth, mask.affine)]
        both = truth.sum() + found.sum()
        rows.append(
            {
                "same_voxels": said.shape == image.shape,
                "affine_differs_mm": float(np.abs(said.affine - image.affine).max()),
                "dice_on_source_voxels": float(2 * (truth & found).sum() / both),
                "centres_apart_mm": float(np.linalg.norm(middles[0] - middles[1])),
                "truth_ml": float(truth.sum() * np.prod(mask.header.get_zooms()[:3]) / 1000),
            }
        )
    exact = all(row["same_voxels"] and row["affine_differs_mm"] < 1e-3 for row in rows)
    return {"scans": len(rows), "all_on_the_source_grid": bool(rows) and exact, "each": rows}


def _middle(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """World coordinates of the middle of a mask; not-a-number for an empty one."""
    voxels = np.argwhere(mask)
    return affine[:3, :3] @ voxels.mean(0) + affine[:3, 3] if len(voxels) else np.full(3, np.nan)


def organs(encoder: Any, args: argparse.Namespace) -> Tasks:
    """One scan with 59 organs: its tokens of stride 4, because few organs fill a semantic token."""
    files = sorted((DATA / "ct_organs" / "example_seg").glob("*.nii.gz"))
    masks = {file.name.split(".")[0]: str(file.relative_to(DATA)) for file in files}
    case = Case(id="a", patient="a", image="ct_organs/example_ct.nii.gz", masks=masks)
    store = _store(manifest("organs", [case]), encoder, args.out / "organs-store")

    def by_class() -> Result:
        random = organ_tokens(random_encoder(encoder.config), store, stage=1)
        return clusters(organ_tokens(encoder, store, stage=1), beside={"random": random})

    return {"clusters": by_class, "unsupervised": lambda: unsupervised(encoder, store, stage=1)}


def phantom(source: Any, args: argparse.Namespace) -> Tasks:
    """Every task on the phantom; few patients are in its test split, so learned tasks use folds."""

    def of(task: str, name: str | None = None, **settings: Any) -> Callable[[], Result]:
        patients = args.phantom_scans if task in WHOLE else args.phantom_cases
        out = args.out / f"phantom-{patients}-{args.steps}" / (name or task)
        more = {"phantom_cases": patients, "out": out, "workers": 1}
        return lambda: sl.evaluate(source, task, "phantom-ct", **more, **settings)

    short = {"steps": args.steps, "validate_every": max(1, args.steps // 4), "resume": True}
    folds = {"label": "malignancy", "split": "cross"}
    return {
        "probe": of("probe", **folds),
        "knn": of("knn", **folds),
        "fewshot": of("fewshot", draws=30, **folds),
        "outcome": of("outcome", label="outcome", repeats=5),
        "outcome, time to event": of("outcome", "time", label="time_months", repeats=5),
        "clusters": of("clusters"),
        "unsupervised": of("unsupervised"),
        "heads": of("heads"),
        "localize": of("localize", images=range(args.phantom_scans)),
        "classify": of("classify", label="malignancy", **short),
        "segment": of("segment", **short),
    }


def manifest(name: str, cases: list[Case]) -> Manifest:
    facts = {"title": name, "modality": "CT", "licence": "see the data", "citation": "-", "homepage": "-"}
    return Manifest(name=name, source=Source(kind="local"), cases=cases, **facts)


def _store(man: Manifest, encoder: Any, folder: Path) -> Any:
    spacing = encoder.config.data.spacing
    sl.build_store(man, DATA, folder, workers=0, spacing=spacing)
    return sl.open_store(folder)


if __name__ == "__main__":
    main()
