"""An encoder for real CT: pretrained on real scans and phantoms together, judged on scans that it never saw.

    python -m benchmarks.studies.real_ct --out runs/studies/real_ct     # train; stopped, the same command goes on

Trains by the recipe of `recipe.py`, half as wide again, on the 24 sarcoma scans and the abdomen of Pancreas-CT of
the folder SMARTLAB_REAL_DATA names, and on training patients of the phantom. The scan of `ct_organs` and the held-out
phantoms are left for judging; of LIDC nothing is used.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import smartlab as sl
from benchmarks.studies.recipe import RECIPE
from smartlab.core.config import parse_overrides
from smartlab.notebook import phantom_folder

SETTINGS = RECIPE | {
    "encoder.embed_dim": 24,
    "encoder.num_heads": [2, 4, 8, 16],
    "train.steps": 2400,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/studies/real_ct"))
    parser.add_argument("--phantoms", type=int, default=48, help="patients of the phantom's training split")
    parser.add_argument("settings", nargs="*", help="other settings, key=value")
    asked = parser.parse_args()
    data = {"data.manifest": str(compose(asked.out / "scans", asked.phantoms))}
    config = sl.load_config("tiny", SETTINGS | data | parse_overrides(asked.settings))
    run = sl.pretrain(config, asked.out / "run", resume=True)
    print(f"step {run.step}")


def compose(home: Path, phantoms: int) -> Path:
    """A folder of real scans and phantoms with a manifest, as a user would make one."""
    if (home / "manifest.json").is_file():
        return home
    real = Path(os.environ.get("SMARTLAB_REAL_DATA") or "../shared/data")
    for scan in sorted((real / "ct_sarcoma").glob("*/CT_image.nii.gz")):
        copy(scan, home / f"{scan.parent.name}.nii.gz")
    shutil.copytree(real / "ct_series" / "Pancreas-CT-CB_001", home / "pancreas", dirs_exist_ok=True)
    drawn = phantom_folder("phantom-ct", RECIPE["data.phantom_cases"])
    patients = sl.make_phantom("ct", drawn, n=RECIPE["data.phantom_cases"], workers=2)
    learned = dict.fromkeys(case.locate(drawn) for case in patients.cases if case.split == "train")
    for scan in list(learned)[:phantoms]:
        copy(scan, home / scan.name)
    sl.scan_folder(home).save(home / "manifest.json")
    return home


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
