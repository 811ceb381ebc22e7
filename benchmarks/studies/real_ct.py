"""An encoder for real CT: pretrained on real scans and phantoms together, judged on scans that it never saw.

    python -m benchmarks.studies.real_ct --out runs/studies/real_ct           # train; stopped, the same command goes on
    python -m benchmarks.studies.real_ct --out runs/studies/real_ct --judge [--beside RUN]  # then judge

Trains by the recipe of `recipe.py`, half as wide again, on the 24 sarcoma scans and the abdomen of Pancreas-CT of
the folder SMARTLAB_REAL_DATA names, and on training patients of the phantom. The scan of `ct_organs` and the held-out
phantoms are left for judging; of LIDC nothing is used.

Judged beside an untrained network, mean and spread of HU, place, and RUN (pretrained on phantoms only):
- organs, real: which organ is a unit of the one scan of `ct_organs` (sides, lobes, ribs and vertebrae taken together)?
  Blocks of 48 mm are judged by what those of other folds taught: seven eighths of all that hold organs, and 16 or 64
  of these. Intervals over blocks: one scan tells nothing of other patients. With blocks of 96 mm and every label a
  class of its own, tried first, all features stood at chance, place and HU too: most organs lie in one such block.
- nodules, real: malignancy of 531 lung nodules, beside their largest area. Intervals over patients.
- organs, phantoms: as in `recipe.py`, on held-out patients.
- segmentation, phantoms: fine-tuned on 1, 2 or 4 labelled patients, from these weights and from scratch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import smartlab as sl
from benchmarks.harness import machine
from benchmarks.studies import recipe
from benchmarks.studies.recipe import RECIPE
from smartlab.core.config import parse_overrides
from smartlab.core.places import code_version
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.data.store.prepare import prepare_store
from smartlab.evaluation.features import tokens
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.features.grids import unit_counts
from smartlab.evaluation.judge.means import patient_weights
from smartlab.evaluation.judge.result import Result, clean
from smartlab.evaluation.look import units
from smartlab.notebook import phantom_folder

SETTINGS = RECIPE | {
    "encoder.embed_dim": 24,
    "encoder.num_heads": [2, 4, 8, 16],
    "train.steps": 2400,
}
RESULTS = Path(__file__).parents[1] / "results" / "real_ct.json"
BLOCK = 16  # voxels of 3 mm
FEW = (16, 64)
SIDES = re.compile(r"(_(left|right|upper|middle|lower|lobe|[CTLS]?[0-9]+))+(?=_|$)")
Found = dict[str, list[float]]  # name -> value, low, high, n


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/studies/real_ct"))
    parser.add_argument("--phantoms", type=int, default=48, help="patients of the phantom's training split")
    parser.add_argument("--judge", action="store_true", help="judge what was trained")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="the other figures stay as they are")
    parser.add_argument("--beside", type=Path, help="a run pretrained on phantoms only")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("settings", nargs="*", help="other settings, key=value")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = {"data.manifest": str(compose(asked.out / "scans", asked.phantoms))}
    overrides = parse_overrides(asked.settings)
    run = sl.pretrain(sl.load_config("tiny", SETTINGS | data | overrides), asked.out / "run", resume=True)
    if not (asked.judge and run.finished):
        return print(f"step {run.step}")
    report: dict[str, Any] = json.loads(asked.json.read_text("utf-8")) if asked.only else {}
    report |= {
        "what": (__doc__ or "").split("\n\n")[0],
        "settings": SETTINGS | overrides,
        "scans": {"real": 25, "phantoms": asked.phantoms},
        "training": recipe.spent(run.path),
        "warnings": warned(run.path),
        "history": run.history.tail(5).mean(numeric_only=True).to_dict(),
        "machine": machine(),
        "code": code_version(),
    }
    for part in asked.only or PARTS:
        report[part] = PARTS[part](run, asked)
        asked.json.write_text(json.dumps(clean(report), indent=1) + "\n", encoding="utf-8")
        for name, found in report[part].items():
            print(f"{part}: {name:<60} {[round(v, 3) for v in found]}", flush=True)


def warned(folder: Path) -> list[dict[str, Any]]:
    """What the run warned of, and when."""
    events = map(json.loads, (folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: e[key] for key in ("step", "message")} for e in events if e["event"] == "warning"]


def compose(home: Path, phantoms: int) -> Path:
    """A folder of real scans and phantoms with a manifest, as a user would make one."""
    if (home / "manifest.json").is_file():
        return home
    real = Path(os.environ.get("SMARTLAB_REAL_DATA") or "../shared/data")
    for scan in sorted((real / "ct_sarcoma").glob("*/CT_image.nii.gz")):
        copy(scan, home / f"{scan.parent.name}.nii.gz")
    shutil.copytree(real / "ct_series" / "Pancreas-CT-CB_001", home / "pancreas", dirs_exist_ok=True)
    if phantoms:
        add_phantoms(home, phantoms)
    sl.scan_folder(home).save(home / "manifest.json")
    return home


def add_phantoms(home: Path, phantoms: int) -> None:
    drawn = phantom_folder("phantom-ct", RECIPE["data.phantom_cases"])
    patients = sl.make_phantom("ct", drawn, n=RECIPE["data.phantom_cases"], workers=2)
    learned = dict.fromkeys(case.locate(drawn) for case in patients.cases if case.split == "train")
    for scan in list(learned)[:phantoms]:
        copy(scan, home / scan.name)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def real_organs(
    run: sl.Run, asked: argparse.Namespace, levels: tuple[str, ...] = ("stage 2", "tokens")
) -> Found:
    """The scan with a model's organs, block by block: nothing of it, nor of its source, was trained on."""
    data = Path(os.environ.get("SMARTLAB_REAL_DATA") or "../shared/data")
    masks = {
        f.name.split(".")[0]: str(f.relative_to(data)) for f in sorted(data.glob("ct_organs/*_seg/*.nii.gz"))
    }
    case = Case(id="organs", patient="organs", image="ct_organs/example_ct.nii.gz", masks=masks)
    facts = {"title": "organs", "modality": "CT", "licence": "-", "citation": "-", "homepage": "-"}
    man = Manifest(name="organs", source=Source(kind="local"), cases=[case], **facts)
    sl.build_store(man, data, asked.out / "organs", workers=0, spacing=run.config.data.spacing)
    store = sl.open_store(asked.out / "organs")
    hu, labels, names = store.array(0)[:], store.labels(0)[:], tokens.organs_of(store)
    nets = {
        "encoder": run.encoder("teacher"),
        "student": run.encoder("student"),
        "random": random_encoder(run.config),
    }
    if asked.beside:
        nets["phantoms only"] = sl.Run(asked.beside).encoder("teacher")
    with torch.inference_mode():
        seen = {name: net.features(hu) for name, net in nets.items()}
    kinds = {value: SIDES.sub("", name) for value, name in names.items()}
    codes = np.zeros(256, np.int64)
    codes[list(kinds)] = 1 + np.unique(list(kinds.values()), return_inverse=True)[1]
    found: Found = {}
    for level in levels:
        maps = {name: tokens._grid(one, units.LEVELS[level]) for name, one in seen.items()}
        stride = tokens.stride_of(nets["encoder"], units.LEVELS[level])
        for blocks in (None, *FEW):
            one = by_block(maps, hu, labels, codes, stride, blocks)
            found |= {
                f"{level}{f', {blocks} blocks' if blocks else ''}/{name}": value
                for name, value in one.items()
            }
    return found


def by_block(
    maps: dict[str, np.ndarray],
    hu: np.ndarray,
    labels: np.ndarray,
    codes: np.ndarray,
    stride: int,
    few: int | None,
) -> Found:
    """Both measures of every network, blocks judged by what those of other folds taught, and the differences."""
    grid = maps["encoder"].shape[:3]
    counts = unit_counts(labels, codes, int(codes.max()) + 1, stride, grid)
    clear = counts.max(1) >= 0.5 * stride**3
    present, organ = np.unique(np.where(clear, counts.argmax(1), 0), return_inverse=True)
    place = np.indices(grid) * stride // BLOCK
    block = np.ravel_multi_index(tuple(place), tuple(place.max((1, 2, 3)) + 1)).ravel()
    features = {n: m.reshape(-1, m.shape[-1]) for n, m in maps.items()} | tokens.plain(hu, stride, grid)
    every = [
        units.Scan({n: f[here].astype(np.float32) for n, f in features.items()}, organ[here])
        for here in (clear & (block == number) for number in np.unique(block[clear]))
    ]
    rich = [n for n, scan in enumerate(every) if len(np.unique(scan.organ)) > 2]  # what one would label
    order, pairs = np.random.default_rng(0).permutation(len(every)), []
    for judged in np.array_split(order, 8):
        others = np.random.default_rng(judged[0]).permutation(np.setdiff1d(rich, judged))
        pairs.append((others[:few], judged))
    names = np.array([f"{n:03d}" for n in range(len(every))])
    weights, _ = patient_weights(names, 1000, 0)
    found: Found = {}
    tables = {f: units._confusions(every, f, names, pairs, 60, len(present), 0) for f in features}
    measured = {f: units._measures(weights, table) for f, table in tables.items()}
    for number, measure in enumerate(units.MEASURES):
        one = {f: (v[number], d[number]) for f, (v, d) in measured.items()}
        found |= told(units._estimates(measure, one, len(every)))
    return found


def told(metrics: dict[str, Any]) -> Found:
    return {name: [e.value, e.low, e.high, e.n] for name, e in metrics.items()}


def nodules(run: sl.Run, asked: argparse.Namespace) -> Found:
    """Malignancy of segmented nodules; LIDC was not trained on."""
    data = Path(os.environ.get("SMARTLAB_REAL_DATA") or "../shared/data") / "nodules"
    result = sl.evaluate(
        run, "probe", "nodules-png", root=data, label="malignancy", out=asked.out / "nodules"
    )
    return {name: value for name, value in told(result.metrics).items() if "auc" in name.split("/")[-1]}


def phantom_organs(run: sl.Run, asked: argparse.Namespace) -> Found:
    """As the recipe is judged."""
    return told_plainly(recipe.judge(run, 32, sl.load_config("tiny", RECIPE).data))


def told_plainly(judged: dict[str, Any]) -> Found:
    return {name: list(value) for name, value in judged.items()}


def few_segmentation(run: sl.Run, asked: argparse.Namespace) -> Found:
    """Dice on held-out phantoms after fine-tuning on few labelled ones, beside the same network from scratch."""
    man, store = prepare_store(sl.load_config("tiny", RECIPE).data, progress=True)
    first = store.cases.drop_duplicates("image")
    train = int((first.split == "train").sum())
    found: Found = {}
    for few in (1, 2, 4):
        settings = {
            "modes": ("full", "scratch"),
            "fractions": (few / train,),
            "steps": 240,
            "validate_every": 80,
        }
        settings |= {"labels": ["liver", "kidney_left", "kidney_right", "spleen"], "resume": True}
        out = asked.out / f"segment-{few}"
        result: Result = sl.evaluate(run, "segment", man, store=store, out=out, **settings)
        found |= {f"{few} labelled: {name}": value for name, value in told(result.metrics).items()}
    return found


PARTS = {
    "organs, real": real_organs,
    "nodules, real": nodules,
    "organs, phantoms": phantom_organs,
    "segmentation, phantoms": few_segmentation,
}


if __name__ == "__main__":
    main()
