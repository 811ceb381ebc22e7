"""Views per second over loader workers, for a store that fits into memory and for one that never does.

    python -m benchmarks.loader_scaling [--quick] --out benchmarks/results/loader-scaling.json

`memory`: the page cache holds the store. `disk`: it is emptied of the store before every pass, and a pass reads
each volume about once, in random order, so that nearly every read goes to the disk, as it does for good with a
store much larger than memory; several passes in a row give the sustained rate. Each pass has a loader (and
workers) of its own, because pages that a process has mapped cannot be dropped. Workers' start is not timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.loader import BATCH, REGION, VIEW, make_volumes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 volumes, two passes")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    os.environ.setdefault("SMARTLAB_SALT", "benchmark-no-secret")
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), 6 if asked.quick else 24, 2 if asked.quick else 5, asked.workers)
    harness.write(result, asked.out)
    for row in result["rows"]:
        print(row)


def measure(folder: Path, count: int, passes: int, workers: list[int]) -> dict[str, Any]:
    from smartlab.data.store.build import build_store

    manifest, source = make_volumes(folder / "volumes", count)
    build_store(manifest, folder / "volumes", folder / "store", workers=0, crop_body=False, progress=False)
    held = sum(f.stat().st_size for f in (folder / "store").rglob("*") if f.is_file())
    rows = []
    for number in workers:
        runs: dict[str, list[float]] = {"memory": [], "disk": []}
        one_pass(folder / "store", number)
        for _ in range(passes):  # in turns
            for kind in runs:
                if kind == "disk":
                    empty_page_cache(folder / "store")
                runs[kind].append(one_pass(folder / "store", number))
        rows.append({"workers": number, **{kind: harness.summary(r) for kind, r in runs.items()}})
    return {
        "what": "views of 96³ per second; two views of each region of 128³",
        "machine": harness.machine(),
        "volumes": {"source": source, "count": count, "store_bytes": held},
        "rows": rows,
    }


def one_pass(path: Path, workers: int) -> float:
    """Views per second over all volumes once, from the first batch to the last."""
    from smartlab.data.crops.loader import CropLoader
    from smartlab.data.crops.views import ViewDataset
    from smartlab.data.store.store import open_store

    store = open_store(path)
    draws = -(-3 * BATCH // len(store))
    dataset = ViewDataset(store, region=REGION, view=VIEW, draws=draws)
    loader = CropLoader(dataset, BATCH, workers=workers)
    try:
        began, views = 0.0, 0
        for batch in loader:
            if began:
                views += batch["views"].shape[0] * batch["views"].shape[1]
            else:
                began = time.perf_counter()  # workers are up
        return views / (time.perf_counter() - began)
    finally:
        loader.close()


def empty_page_cache(folder: Path) -> None:
    for file in (f for f in folder.rglob("*") if f.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
