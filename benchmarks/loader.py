"""How fast, how small: views from the store beside MONAI's PersistentDataset.

    python -m benchmarks.loader [--quick] [--core N] --out benchmarks/results/loader-MACHINE.json

Volumes of 256×179×179 int16 at 2 mm. With the real data (SMARTLAB_REAL_DATA, or ../shared/data):
the soft-tissue sarcoma CTs, resampled to 2 mm and mirrored until they fill that shape, which keeps
their noise; else the CT phantom. Both loaders run in this process on one core with one thread, on the
same files, page cache warm, in turns; a view is one of two overlapping 96³ crops of one 128³ region,
ready in an int16 batch tensor. Bytes are what the process asks the system for (`rchar` in
/proc/self/io, blosc2 without mmap so that its reads are visible). `page_cache_empty` is the first pass
from the disk; the bytes are then mostly its read-ahead (`machine.read_ahead_kb`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import machine

SHAPE = (256, 179, 179)
VIEW, REGION, BATCH = 96, 128, 8  # pairs of views in a batch
MM = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 volumes, 3 rounds: a minute")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="which core to use")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    pin(asked.core)
    rounds, count = (3, 4) if asked.quick else (9, 24)
    with tempfile.TemporaryDirectory() as folder:
        manifest, source = make_volumes(Path(folder) / "volumes", count)
        result = {
            "what": "views of 96³ per second on one core, bytes per view, share of raw int16",
            "machine": machine() | {"read_ahead_kb": read_ahead(Path(tempfile.gettempdir()))},
            "volumes": {"source": source, "count": len(manifest.cases), "shape": SHAPE, "dtype": "int16"},
            **measure(manifest, Path(folder), rounds),
            "real_cases": real_cases(Path(folder) / "real"),
        }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def pin(core: int) -> None:
    """One core and one thread, for everything that could use more."""
    os.sched_setaffinity(0, {core})
    os.environ.setdefault("SMARTLAB_SALT", "benchmark-no-secret")
    warnings.filterwarnings("ignore")
    import blosc2
    import torch

    torch.set_num_threads(1)
    blosc2.set_nthreads(1)


# ---- volumes -------------------------------------------------------------------------------------


def real_data() -> Path | None:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SMARTLAB_REAL_DATA", default))
    return folder if (folder / "ct_sarcoma").is_dir() else None


def make_volumes(folder: Path, count: int) -> tuple[Any, str]:
    """NIfTI files of SHAPE with a manifest."""
    import nibabel as nib

    from smartlab.data.images.readers import read_volume
    from smartlab.data.images.resample import resample, target_grid, to_hounsfield

    files, source = source_files(folder.with_name("phantom"), count)
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        scan = read_volume(file)
        shape, affine = target_grid(scan.shape, scan.affine, MM)
        array = to_hounsfield(resample(scan.array, scan.affine, shape, affine), scan.array)
        missing = [(0, max(0, n - have)) for n, have in zip(SHAPE, array.shape, strict=True)]
        array = np.pad(array, missing, mode="symmetric")[tuple(slice(n) for n in SHAPE)]
        nib.save(nib.Nifti1Image(array, np.diag([MM, MM, MM, 1])), folder / f"{number:02d}.nii.gz")
    return cohort("bench", {f"{n:02d}.nii.gz": f"{n:02d}.nii.gz" for n in range(len(files))}), source


def source_files(folder: Path, count: int) -> tuple[list[Path], str]:
    if (real := real_data()) is not None:
        return sorted(real.glob("ct_sarcoma/*/CT_image.nii.gz"))[
            :count
        ], "24 soft-tissue sarcoma CTs, mirrored"
    from smartlab.data.phantoms.make import make_phantom

    made = make_phantom("ct", folder, n=2, seed=0, progress=False)
    return [group.cases[0].locate(folder) for group in made.images()], "CT phantom, mirrored"


def cohort(name: str, images: dict[str, str]) -> Any:
    from smartlab.data.cohort.manifest import Manifest

    return Manifest.model_validate(
        {
            "name": name,
            "title": name,
            "modality": "CT",
            "licence": "-",
            "citation": "-",
            "homepage": "-",
            "source": {"kind": "local"},
            "cases": [{"id": i, "patient": i, "image": place} for i, place in images.items()],
        }
    )


# ---- measuring -----------------------------------------------------------------------------------


def measure(manifest: Any, folder: Path, rounds: int) -> dict[str, Any]:
    from smartlab.data.store.build import build_store
    from smartlab.data.store.store import open_store

    raw = len(manifest.cases) * int(np.prod(SHAPE)) * 2
    start = time.perf_counter()
    build_store(manifest, folder / "volumes", folder / "store", workers=0, crop_body=False, progress=False)
    seconds = time.perf_counter() - start
    cold_store = cold(folder / "store", store_reader(open_store(folder / "store"), batches=2))
    store = open_store(folder / "store")  # a new one: pages that are mapped cannot be dropped
    ours = store_reader(store)
    theirs = monai_reader([folder / "volumes" / case.image for case in manifest.cases], folder / "monai")
    cold_monai = cold(folder / "monai", theirs)
    runs: dict[str, list[tuple[float, float]]] = {"store": [], "monai": []}
    ours(), theirs()  # page cache warm, memory allocated
    for _ in range(rounds):  # in turns, so that a busy machine slows both
        for name, read in (("store", ours), ("monai", theirs)):
            runs[name].append(views_per_second(read))
    stored = sum(row["bytes"] for row in store.rows)
    cached = sum(f.stat().st_size for f in (folder / "monai").rglob("*.pt"))
    return {
        "store": {
            **speed(runs["store"]),
            "bytes_per_view": asked_bytes(lambda: store_reader(unmapped(folder / "store")))(),
            "page_cache_empty": cold_store,
            "share_of_raw": round(stored / raw, 4),
            "build_seconds_per_volume": round(seconds / len(manifest.cases), 2),
        },
        "monai_persistent_dataset": {
            **speed(runs["monai"]),
            "bytes_per_view": asked_bytes(lambda: theirs)(),
            "page_cache_empty": cold_monai,
            "share_of_raw": round(cached / raw, 4),
        },
        "ratio_of_medians": round(
            statistics.median(r[0] for r in runs["store"]) / statistics.median(r[0] for r in runs["monai"]), 1
        ),
    }


Reader = Callable[[], int]  # reads some batches, returns how many views


def store_reader(store: Any, batches: int = 16) -> Reader:
    from smartlab.data.crops.loader import CropLoader
    from smartlab.data.crops.views import ViewDataset

    draws = -(-batches * BATCH // len(store))
    loader = CropLoader(ViewDataset(store, region=REGION, view=VIEW, draws=draws), BATCH)

    def read() -> int:
        return sum(batch["views"].shape[0] * batch["views"].shape[1] for batch in loader)

    return read


def monai_reader(files: list[Path], cache: Path, batches: int = 4) -> Reader:
    """PersistentDataset of int16 tensors, cropped as the store's views are."""
    import torch
    from monai.data import PersistentDataset
    from monai.transforms import Compose, LoadImaged, RandSpatialCropd, RandSpatialCropSamplesd

    cut = [
        LoadImaged("image", ensure_channel_first=True, dtype=np.int16, image_only=True),
        RandSpatialCropd("image", REGION, random_size=False),
        RandSpatialCropSamplesd("image", VIEW, num_samples=2, random_size=False),
    ]
    data = PersistentDataset([{"image": str(file)} for file in files], Compose(cut), cache_dir=cache)
    for number in range(len(files)):
        data[number]  # fills the cache
    rng = np.random.default_rng(0)

    def read() -> int:
        for _ in range(batches):
            pairs = [data[int(rng.integers(len(files)))] for _ in range(BATCH)]
            batch = torch.stack([torch.stack([crop["image"].as_tensor() for crop in pair]) for pair in pairs])
            assert batch.dtype == torch.int16 and batch.shape[-3:] == (VIEW,) * 3
        return batches * BATCH * 2

    return read


def views_per_second(read: Reader) -> tuple[float, float]:
    """By the clock, and by the processor time of this process: the same on a core of one's own."""
    start, cpu = time.perf_counter(), time.process_time()
    views = read()
    return views / (time.perf_counter() - start), views / (time.process_time() - cpu)


def speed(runs: list[tuple[float, float]]) -> dict[str, Any]:
    clock, cpu = zip(*runs, strict=True)
    return {
        "views_per_second_median": round(statistics.median(clock)),
        "views_per_second_best": round(max(clock)),
        "views_per_cpu_second_median": round(statistics.median(cpu)),
        "views_per_second_runs": [round(run) for run in clock],
    }


def io_counter(name: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[name])


def asked_bytes(make: Callable[[], Reader]) -> Callable[[], int]:
    def run() -> int:
        read = make()
        read()  # opens the files
        before = io_counter("rchar")
        views = read()
        return (io_counter("rchar") - before) // views

    return run


def unmapped(path: Path) -> Any:
    """The store with ordinary file reads, which the system counts."""
    import blosc2

    from smartlab.data.store.store import open_store

    store = open_store(path)
    store.array = lambda i: blosc2.open(  # type: ignore[method-assign]
        str(path / store.rows[i]["file"]), mode="r", dparams=blosc2.DParams(nthreads=1)
    )
    return store


def cold(files: Path, read: Reader) -> dict[str, int | None]:
    """Bytes per view and views per second from the disk, the page cache emptied of these files."""
    for file in (f for f in files.rglob("*") if f.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, start = io_counter("read_bytes"), time.perf_counter()
    views = read()
    seconds, fetched = time.perf_counter() - start, io_counter("read_bytes") - before
    if fetched == 0:  # the folder is in memory
        return {"bytes_per_view": None, "views_per_second": None}
    return {"bytes_per_view": fetched // views, "views_per_second": round(views / seconds)}


def real_cases(folder: Path) -> dict[str, Any] | None:
    """Share of the raw size for whole real scans as they are stored: resampled and cropped."""
    from smartlab.data.store.build import build_store
    from smartlab.data.store.store import open_store

    if (root := real_data()) is None:
        return None
    places = [str(f.relative_to(root)) for f in sorted(root.glob("ct_sarcoma/*/CT_image.nii.gz"))]
    places += ["ct_series/Pancreas-CT-CB_001", "ct_series/LIDC-IDRI-0001", "ct_organs/example_ct.nii.gz"]
    build_store(cohort("real", {p: p for p in places}), root, folder, workers=0, progress=False)
    store = open_store(folder)
    size = np.array([row["bytes"] for row in store.rows], float)
    raw = np.array([2 * np.prod(row["shape"]) for row in store.rows], float)
    source = np.array([2 * np.prod(row["source_shape"]) for row in store.rows], float)
    share = np.round(size / raw, 3).tolist()
    return {
        "scans": len(store),
        "share_of_raw": round(size.sum() / raw.sum(), 4),
        "share_of_source": round(size.sum() / source.sum(), 4),
        "sarcoma_24": round(size[:24].sum() / raw[:24].sum(), 4),
        **dict(zip(("pancreas_ct", "lidc_16_slices", "abdomen_3mm"), share[24:], strict=True)),
        "lowest_and_highest": [min(share), max(share)],
    }


def read_ahead(folder: Path) -> int | None:
    device = folder.stat().st_dev
    setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    return int(setting.read_text()) if setting.is_file() else None


if __name__ == "__main__":
    main()
