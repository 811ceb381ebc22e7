"""A cohort of many images: how long until the first step, and how much memory.

    python -m benchmarks.many --images 10000 --out benchmarks/results/many.json

Tiny volumes, each a file of its own, are built into a store once; then `smartlab pretrain` is timed from the
command to the first row of metrics.csv, with the store up to date: what every run after the first waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import machine

SIZE = 24  # voxels per side; a view of 32 is padded
SMALL = {
    "data.view": 32,
    "data.region": 32,
    "data.workers": 2,
    "train.steps": 1,
    "train.batch": 2,
    "train.log_every": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    os.environ.setdefault("SMARTLAB_SALT", "benchmark-no-secret")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), asked.images, asked.times)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(folder: Path, images: int, times: int) -> dict[str, Any]:
    from smartlab.data.store.build import build_store
    from smartlab.data.store.store import open_store

    man = make_images(folder / "raw", images)
    start = time.perf_counter()
    build_store(man, folder / "raw", folder / "store", workers=2, progress=False)
    built = time.perf_counter() - start
    start = time.perf_counter()
    open_store(folder / "store")
    opened = time.perf_counter() - start
    runs = [first_step(folder, folder / f"run-{number}") for number in range(times)]
    return {
        "images": images,
        "build_seconds": round(built, 1),
        "open_store_seconds": round(opened, 3),
        "first_step_seconds": [round(seconds, 1) for seconds, _ in runs],
        "peak_memory_mb": [round(memory) for _, memory in runs],
    }


def make_images(folder: Path, images: int) -> Any:
    """Files of their own with a manifest: a small body in air, the same content."""
    import nibabel as nib

    from smartlab.data.cohort.manifest import Manifest

    folder.mkdir(parents=True)
    hu = np.full((SIZE,) * 3, -1000, np.int16)
    hu[4:20, 4:20] = 40 + np.random.default_rng(0).integers(-20, 20, (16, 16, SIZE))
    content = nib.Nifti1Image(hu, np.diag([2.0, 2.0, 2.0, 1.0])).to_bytes()
    cases = []
    for number in range(images):
        (folder / f"{number:05d}.nii").write_bytes(content)
        cases.append({"id": f"c{number}", "patient": f"p{number}", "image": f"{number:05d}.nii"})
    man = Manifest.model_validate({"name": "many", "cases": cases})
    man.save(folder / "manifest.json")
    return man


def first_step(folder: Path, out: Path) -> tuple[float, float]:
    """Seconds from the command to the first row of metrics.csv, and the peak memory it tells."""
    words = [f"{key}={value}" for key, value in SMALL.items()]
    words += [f"data.manifest={folder / 'raw'}", f"data.store={folder / 'store'}"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "smartlab", "pretrain", "tiny", *words, "--out", str(out), "--json"],
        stdout=subprocess.DEVNULL,
    )
    table = out / "metrics.csv"
    while process.poll() is None and not (table.exists() and table.read_text().count("\n") > 1):
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.wait() != 0:
        raise RuntimeError("the run failed")
    names, values = (line.split(",") for line in table.read_text().splitlines()[:2])
    return seconds, float(dict(zip(names, values, strict=True))["peak_memory_mb"])


if __name__ == "__main__":
    main()
