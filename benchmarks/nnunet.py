"""nnU-Net itself fine-tunes one of our encoders, beside the same network from scratch, on small phantoms: a smoke run.

    python -m benchmarks.nnunet --python /path/of/nnunet/bin/python [--run runs/a] [--epochs 3 --iterations 40]

It plans, preprocesses, loads, trains, predicts and measures by nnU-Net's own commands, in an environment of its own (docs/NNUNET.md:
how to make it). Twice: as nnU-Net takes the plan, which standardises each image, and with the window and the axes of pretraining
(`fit_plans`). The Dice of its validation and of test scans come back into `sl.compare`. So few iterations judge nothing: what is
shown is that every step works, and what the network is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
import pandas as pd

import smartlab as sl
from benchmarks import harness
from benchmarks.nnunet_inside import COUNTED
from smartlab.core.places import code_version
from smartlab.evaluation.judge.nnunet import dice_table
from smartlab.evaluation.judge.result import clean
from smartlab.interop.nnunet import fit_plans

INSIDE = Path(__file__).with_name("nnunet_inside.py")
NUMBER, NAME, FOLD = "501", "Dataset501_Phantom", "0"
TRAINER = "PretrainedTrainer_Primusx"
LABELS = {"lungs": ("lung_left", "lung_right"), "heart": ("heart",), "liver": ("liver",), "spine": ("spine",)}
SIZE: dict[str, Any] = {"shape": (80, 80, 80), "spacing": 4.0}
ENCODER = {"data.spacing": 4.0, "data.phantom_cases": 16}
LINES = re.compile(
    r"Loaded Network|without loading|train whole net|Epoch \d|train_loss|val_loss|Pseudo dice|Mean Validation|split has"
)
VERSIONS = (
    "import json, platform; from importlib.metadata import distribution as d; "
    "names = ['nnunetv2', 'torch', 'dynamic-network-architectures', 'timm', 'batchgeneratorsv2']; "
    "print(json.dumps({'python': platform.python_version()} | {n: d(n).version for n in names}))"
)


class NnUNet:
    """Its commands, in its own environment and folders."""

    def __init__(self, python: Path, root: Path) -> None:
        self.python, self.root, self.seconds = python, root, 0.0
        folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
        few = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f", "MPLBACKEND": "Agg"}
        self.env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | folders | few

    def __call__(self, command: str, *words: str | Path, short: str = "") -> str:
        """What it says; words in one string are taken apart, paths are not."""
        print(command, *words, flush=True)
        apart = [str(part) for word in words for part in ([word] if isinstance(word, Path) else word.split())]
        began = time.perf_counter()
        line = [str(self.python), str(INSIDE), *short.split(), command, *apart]
        done = subprocess.run(line, env=self.env, capture_output=True, text=True, check=False)
        self.seconds = round(time.perf_counter() - began, 1)
        with (self.root / f"{command}.log").open("a") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def versions(self) -> dict[str, str]:
        return json.loads(subprocess.check_output([self.python, "-c", VERSIONS], text=True))

    def folder(self, kind: str) -> Path:
        return self.root / kind / NAME


def raw_data(folder: Path, train: int, test: int) -> None:
    """Phantoms in nnU-Net's layout, of patients that pretraining did not see, stored as scanners' files often are (LPS)."""
    made = sl.make_phantom("ct", folder.parents[1] / "phantoms", n=train + test, seed=1, **SIZE)
    values = {name: value for value, name in made.organs.items()}
    lps = nib.orientations.axcodes2ornt("LPS")
    for place, (image, case) in enumerate({case.image: case for case in made.cases}.items()):
        part = "Tr" if place < train else "Ts"
        organs = nib.load(made_at := folder.parents[1] / "phantoms" / str(case.label_map))
        found, labels = np.asarray(organs.dataobj), np.zeros(organs.shape, np.uint8)
        for value, names in enumerate(LABELS.values(), 1):
            labels[np.isin(found, [values[name] for name in names])] = value
        scan = nib.load(made_at.parents[1] / str(image))
        for kind, one, end in (
            ("images", scan, "_0000"),
            ("labels", nib.Nifti1Image(labels, organs.affine), ""),
        ):
            turn = nib.orientations.ornt_transform(nib.io_orientation(one.affine), lps)
            place_of = folder / f"{kind}{part}" / f"{case.patient}{end}.nii.gz"
            place_of.parent.mkdir(parents=True, exist_ok=True)
            nib.save(one.as_reoriented(turn), place_of)
    about = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {name: value for value, name in enumerate(LABELS, 1)},
        "numTraining": train,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=1))


def what_it_sees(nnunet: NnUNet, plans: str, window: tuple[float, float]) -> dict[str, float]:
    """nnU-Net's preprocessed scans beside what our encoder gets of the same files."""
    about = json.loads((nnunet.folder("preprocessed") / f"{plans}.json").read_text())
    folder = nnunet.folder("preprocessed") / about["configurations"]["3d_fullres"]["data_identifier"]
    theirs, ours = [], []
    for file in sorted(folder.glob("*.b2nd")):
        if not file.name.endswith("_seg.b2nd"):
            scan = sl.read_volume(nnunet.folder("raw") / "imagesTr" / f"{file.stem}_0000.nii.gz")
            ours.append((np.clip(scan.array.astype(float), *window) - window[0]) / (window[1] - window[0]))
            theirs.append(np.asarray(blosc2.open(str(file), mode="r")[:])[0])
    a, b = np.stack(theirs), np.stack(ours)
    return {
        "scans": len(a),
        "lowest": float(a.min()),
        "highest": float(a.max()),
        "largest_difference": float(np.abs(a - b).max()),
        "correlation": float(np.corrcoef(a.ravel(), b.ravel())[0, 1]),
    }


def train(
    nnunet: NnUNet, plans: str, scratch: bool, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """One training: what nnU-Net said of it, and its two tables of Dice."""
    said = nnunet(
        "nnUNetv2_train_pretrained",
        f"{NUMBER} 3d_fullres {FOLD} -p {plans} -tr {TRAINER} -device {args.device}",
        "--from_scratch" if scratch else "",
        short=f"--epochs {args.epochs} --iterations {args.iterations}",
    )
    seconds, name = nnunet.seconds, plans + ("__from_scratch" if scratch else "")
    model = nnunet.folder("results") / f"{TRAINER}__{name}__3d_fullres"
    log = "".join(file.read_text() for file in sorted(model.glob(f"fold_{FOLD}/training_log_*.txt")))
    of_it = f"-d {NUMBER} -c 3d_fullres -f {FOLD} -p {name} -tr {TRAINER} -device {args.device} -npp 1 -nps 1"
    raw, test = nnunet.folder("raw"), model / "test"
    nnunet("nnUNetv2_predict", "-i", raw / "imagesTs", "-o", test, of_it)
    facts = ("-djfile", test / "dataset.json", "-pfile", test / "plans.json", "-np 1")
    nnunet("nnUNetv2_evaluate_folder", raw / "labelsTs", test, *facts)
    counted = [json.loads(line.partition(COUNTED)[2]) for line in said.splitlines() if COUNTED in line]
    files = {"validation": model / f"fold_{FOLD}" / "validation", "test": test}
    dice = {part: dice_table(folder / "summary.json") for part, folder in files.items()}
    found = {
        "seconds": seconds,
        "counted": counted[0] if counted else None,
        "log": [line.replace(str(nnunet.root), "…") for line in log.splitlines() if LINES.search(line)],
        "mean_dice": {part: float(table.dice.mean()) for part, table in dice.items()},
        "dice": {
            part: table.pivot(index="structure", columns="case", values="dice").to_dict()
            for part, table in dice.items()
        },
    }
    return found, dice


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has nnU-Net")
    parser.add_argument("--commit", default=None, help="of nnU-Net's repository, to be told in the result")
    parser.add_argument(
        "--run", type=Path, help="a run of a Primus at 4 mm; else primus-tiny is pretrained shortly"
    )
    parser.add_argument("--steps", type=int, default=100, help="of that pretraining")
    parser.add_argument(
        "--scans", type=int, nargs=2, default=(15, 4), help="for training and validation, and for the test"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/nnunet"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nnunet.json"))
    args = parser.parse_args()
    work = args.work.resolve()
    settings = ENCODER | {"train.steps": args.steps}
    run = args.run or sl.pretrain(sl.load_config("primus-tiny", settings), out=work / "run").path
    weights = Path(sl.export(run, "nnunet", work / "encoder.pth"))
    nnunet, config = NnUNet(args.python, work), sl.Run(run).config
    raw_data(nnunet.folder("raw"), *args.scans)
    nnunet("nnUNetv2_extract_fingerprint", f"-d {NUMBER} -np 1")
    nnunet("nnUNetv2_plan_experiment", f"-d {NUMBER}")
    like = "-am like_pretrained -np 1"
    nnunet("nnUNetv2_preprocess_like_nnssl", f"-d {NUMBER} -n smartlab -pc", weights, like)
    (planned,) = nnunet.folder("preprocessed").glob("ptPlans__smartlab____*___Norm__Z.json")
    fitted = fit_plans(planned, weights).stem
    nnunet("nnUNetv2_preprocess", f"-d {NUMBER} -plans_name {fitted} -c 3d_fullres -np 1")
    result: dict[str, Any] = {
        "what": "a smoke run: every step of nnU-Net's fine-tuning works with our export; so few iterations judge nothing",
        "encoder": {
            "preset": config.encoder.preset,
            "method": config.method.preset,
            "steps": sl.Run(run).step,
        },
        "versions": nnunet.versions() | {"commit": args.commit},
        "settings": {"epochs": args.epochs, "iterations": args.iterations, "scans": list(args.scans), **SIZE},
        "plans": {},
    }
    for name, one in {"standardised": planned.stem, "as in pretraining": fitted}.items():
        found: dict[str, Any] = {"name": one, "input": what_it_sees(nnunet, one, config.data.window)}
        dice: dict[str, dict[str, pd.DataFrame]] = {}
        for start in ("pretrained", "scratch"):
            found[start], dice[start] = train(nnunet, one, start == "scratch", args)
        for part in ("validation", "test"):
            tables = {start: of_it[part] for start, of_it in dice.items()}
            found[f"compared on {part}"] = sl.compare(tables, "segment").to_dict("records")
        result["plans"][name] = found
        harness.write(clean(result), args.out)
    harness.write(clean(result | {"machine": harness.machine(), "code": code_version()}), args.out)
    for name, found in result["plans"].items():
        print(name, {start: found[start]["mean_dice"] for start in ("pretrained", "scratch")})


if __name__ == "__main__":
    main()
