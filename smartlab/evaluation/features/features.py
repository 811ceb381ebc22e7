"""Features of a cohort from a frozen encoder, as a `FeatureTable`.

    lesion_features   a row per lesion: a crop centred on it
    scan_features     a row per image or patient: the whole scan, by sliding windows
    organ_features    a row per organ and scan: the tokens that lie in the organ
    stack_features    a row per nodule of a folder of PNG stacks

What a row consists of is said by `pooling` (see `pooling.py`). Images come at the voxel size the
encoder was trained at and are encoded a few at a time: what stays in memory is one row of float32 each.

Features are cached on disk under a hash of everything they follow from: weights and configuration of the
encoder, content of the data, cases, crop, pooling, and `FORMAT`. Labels are never cached: they come
from the store each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from tqdm.auto import tqdm

from smartlab.core.errors import DataError, UseError
from smartlab.core.places import cache_folder
from smartlab.data.cohort.case import LabelSpec
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.cohort.png_stacks import BACKGROUND, to_hounsfield
from smartlab.data.crops.augment import window
from smartlab.data.crops.flat import is_flat, lesion_crops
from smartlab.data.crops.loader import CropLoader
from smartlab.data.crops.regions import is_lesion
from smartlab.data.images.grid import AIR, Spacing, same_spacing
from smartlab.data.images.resample import LabelPainter, over_channels, resample, target_grid
from smartlab.data.images.resample import to_hounsfield as rounded
from smartlab.data.store.store import Store
from smartlab.evaluation.features import pooling as pool
from smartlab.evaluation.features.cache import Arrays, cached
from smartlab.evaluation.features.cases import lesion_rows, read_stacks, scan_rows
from smartlab.evaluation.features.encoders import EncoderSource, as_encoder, identity, network_input, ready
from smartlab.evaluation.features.table import FeatureTable
from smartlab.models.encoder import AnyEncoder

FORMAT = 1  # raise it when the code below or the encoder would give other numbers
Cache = bool | str | Path  # True: in the cache folder; False: nowhere; else this folder
_VOXELS = 2 * 96**3  # per batch on a CPU: the widest activations of SMIT's encoder stay below 200 MB


class How(TypedDict, total=False):
    """What all of them take beside: the encoder's role in a run, where it runs, what is kept on disk."""

    pooling: str
    spacing: Spacing | None  # mm, by default as in training
    role: str
    device: str | torch.device | None  # by default where the encoder is
    cache: Cache
    progress: bool


class Extraction:
    """An encoder set up for feature extraction: where it runs, what is cached, what goes into results."""

    def __init__(
        self,
        source: EncoderSource,
        allowed: Sequence[str],
        *,
        pooling: str = "cls",
        spacing: Spacing | None = None,
        role: str = "teacher",
        device: str | torch.device | None = None,
        cache: Cache = True,
        progress: bool = True,
    ) -> None:
        """allowed: parts of a pooling that have a meaning here."""
        given, self.facts = as_encoder(source, role)
        self.pooling, self.quiet = pooling, not progress
        pool.parts(pooling, tuple(allowed))
        self.encoder: AnyEncoder = ready(given, device)
        self.config, self.device = given.config, next(self.encoder.parameters()).device
        wanted: Any = np.asarray(given.config.data.spacing if spacing is None else spacing, float).tolist()
        self.spacing: Spacing = wanted
        self.folder = (
            None if cache is False else cache_folder() / "features" if cache is True else Path(cache)
        )

    def bar(self, items: Any = None, **more: Any) -> Any:
        return tqdm(items, disable=self.quiet, mininterval=1, **more)

    def crop_size(self, size: int | None) -> int:
        """Voxels per side of a crop, the training view by default; whole strides only."""
        size, total = size or self.config.data.view, self.encoder.total
        if size < 1 or size % total:
            above = max(1, -(-size // total)) * total
            raise UseError(
                f"size={size} is not divisible by the encoder's total stride {total}", fix=f"use size={above}"
            )
        return size

    def rows(self, settings: dict[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Arrays from the cache, else computed without gradients and kept."""
        encoder = {"encoder": identity(self.encoder), "device": self.device.type}
        settings = {"format": FORMAT, **encoder, "pooling": self.pooling, "spacing": self.spacing, **settings}

        def frozen() -> Arrays:
            with torch.inference_mode():
                return compute()

        return cached(self.folder, settings, frozen)

    def encode(self, batches: Iterable[torch.Tensor], n: int, what: str) -> np.ndarray:
        """(n, C) rows of crops that come in batches (B, D, H, W) or (B, C, D, H, W) of int16 as stored."""
        x = np.empty((n, pool.width(self.encoder, self.pooling)), np.float32)
        done, (low, high) = 0, self.config.data.window
        with self.bar(total=n, desc=f"{what} features") as bar:
            for hu in batches:
                out = self.encoder(network_input(window(hu.to(self.device), low, high)))
                x[done : done + len(hu)] = pool.pool_crops(out, self.pooling).cpu().numpy()
                done += len(hu)
                bar.update(len(hu))
        return x

    def batch(self, size: int, batch: int | None) -> int:
        """Crops per batch: as given, else what fits well."""
        voxels = size**self.encoder.dims
        return batch or max(1, min(256, (_VOXELS if self.device.type == "cpu" else 16 * _VOXELS) // voxels))

    def table(
        self, x: np.ndarray, about: pd.DataFrame, specs: dict[str, LabelSpec], **facts: Any
    ) -> FeatureTable:
        more = {"pooling": self.pooling, "spacing": self.spacing, "patients": about.patient.nunique()}
        return FeatureTable(x, about, specs, self.facts | more | facts)


def lesion_features(
    encoder: EncoderSource,
    store: Store,
    manifest: Manifest | str | Path,
    *,
    size: int | None = None,
    cases: Iterable[str] | None = None,
    batch: int | None = None,
    workers: int = 0,
    **how: Unpack[How],
) -> FeatureTable:
    """One row per lesion, from a crop centred on it; of mammograms a square around it, see `ImageDataset`.

    manifest: says what the labels mean.   size: voxels per side, the training view by default.
    cases:    keys of `store.cases`, by default every case with a lesion.   how: see `How`.

    >>> table = lesion_features("runs/a", store, "phantom-ct", pooling="cls+stages")
    >>> x, y, classes = table.labelled("malignancy")
    """
    job = Extraction(encoder, pool.POOLINGS, **how)
    side = job.crop_size(size)
    same = same_spacing(job.spacing, store.spacing)  # then cut, as in training: resampling would blur
    margin = job.config.data.margin
    dataset = lesion_crops(store, side, None if same else job.spacing, cases=cases, margin=margin)
    dataset.fields.pop("crop_labels", None)  # not read where not needed
    keys = list(dataset.table.index)

    def compute() -> Arrays:
        loader = CropLoader(dataset, job.batch(side, batch), workers=workers, shuffle=False, drop_last=False)
        try:
            return {"x": job.encode((b["crop"] for b in loader), len(keys), "lesion")}
        finally:
            loader.close()

    data = {"data": store.fingerprint, "manifest": (man := load_manifest(manifest)).name}
    settings = {"kind": "lesion", **data, "size": side, "cases": keys}
    x = job.rows(settings | ({"margin": margin} if is_flat(store) else {}), compute)["x"]
    return job.table(x, lesion_rows(store, keys, man), man.labels, size=side, **data)


def scan_features(
    encoder: EncoderSource,
    store: Store,
    manifest: Manifest | str | Path,
    *,
    by: Literal["image", "patient"] = "image",
    images: Iterable[int] | None = None,
    **how: Unpack[How],
) -> FeatureTable:
    """One row per image, or per patient the mean of the images; "center" pooling has no meaning here.

    A label on which the cases of an image (or patient) disagree is missing.
    """
    if by not in ("image", "patient"):
        raise UseError(f"by={by!r}", expected="'image' or 'patient'")
    job = Extraction(encoder, ("cls", "tokens", "stages"), **how)
    man, chosen = load_manifest(manifest), _images(store, images)

    def compute() -> Arrays:
        scans, flat = job.bar(chosen, desc="scan features"), is_flat(store)
        volumes = (store.array(i)[:, :, 0] if flat else _scan(store, i, job.spacing, False)[0] for i in scans)
        rows = [pool.pool_scan(job.encoder, volume, job.pooling) for volume in volumes]
        return {"x": np.stack(rows)}

    data = {"data": store.fingerprint, "manifest": man.name}
    x = job.rows({"kind": "scan", **data, "images": chosen}, compute)["x"]
    about = scan_rows(store, chosen, man, by)
    x = np.stack([x[rows].mean(0) for rows in about.pop("rows")])
    return job.table(x, about, man.labels, by=by, **data)


def organ_features(
    encoder: EncoderSource,
    store: Store,
    manifest: Manifest | str | Path,
    *,
    images: Iterable[int] | None = None,
    min_voxels: int = 64,
    lesions: bool = False,
    **how: Unpack[How],
) -> FeatureTable:
    """One row per organ and scan: the mean over the organ's voxels of the tokens they lie in.

    min_voxels: smaller pieces are left out.   lesions: also those labels whose name means a lesion.
    `about` also has "voxels" and "center_mm" of the organ, and "label:organ" its name.
    """
    if is_flat(store):
        raise UseError("mammograms have no organs", path=store.path, fix="use lesion or scan features")
    how.setdefault("pooling", "tokens")
    job = Extraction(encoder, ("tokens", "stages"), **how)
    names = {v: name for v, name in store.label_names.items() if lesions or not is_lesion(name)}
    man = load_manifest(manifest)
    chosen = [i for i in _images(store, images) if store.rows[i]["labels"]]
    if not names or not chosen:
        raise DataError("no image has organ labels", path=store.path, fix="give masks in the manifest")

    def compute() -> Arrays:
        parts = []
        for i in job.bar(chosen, desc="organ features"):
            volume, labels, affine = _scan(store, i, job.spacing, True)
            found = [(v, at) for v, at in _regions(labels) if v in names and len(at) >= min_voxels]
            rows = pool.pool_regions(job.encoder, volume, [at for _, at in found], job.pooling)
            middles = [affine[:3, :3] @ at.mean(0) + affine[:3, 3] for _, at in found]
            parts += [(x, i, v, len(at), mm) for x, (v, at), mm in zip(rows, found, middles, strict=True)]
        if not parts:
            raise DataError(f"no organ has {min_voxels} voxels", path=store.path, fix="lower `min_voxels`")
        kinds = zip(("x", "image", "value", "voxels", "center_mm"), zip(*parts, strict=True), strict=True)
        return {name: np.array(values) for name, values in kinds}

    data = {"data": store.fingerprint, "manifest": man.name}
    settings = {"kind": "organ", **data, "images": chosen, "values": list(names), "min_voxels": min_voxels}
    found = job.rows(settings, compute)
    organ = [names[v] for v in found["value"].tolist()]
    about = scan_rows(store, chosen, man, "image").drop(columns="rows").set_index("image", drop=False)
    about = about.loc[found["image"]].reset_index(drop=True)
    keys = [store.rows[i]["key"] for i in about.image]
    about["case"] = [f"{key}:{name}" for key, name in zip(keys, organ, strict=True)]
    about["label:organ"], about["voxels"] = organ, found["voxels"]
    about["center_mm"] = found["center_mm"].tolist()
    classes = [name for v, name in sorted(names.items()) if name in set(organ)]
    specs = man.labels | {"organ": LabelSpec(kind="multiclass", classes=classes)}
    return job.table(found["x"], about, specs, **data)


def stack_features(
    encoder: EncoderSource,
    manifest: Manifest | str | Path,
    root: str | Path,
    *,
    size: int | None = None,
    grey_hu: tuple[float, float] | None = None,
    batch: int | None = None,
    **how: Unpack[How],
) -> FeatureTable:
    """One row per nodule of a folder of PNG stacks (`data/png_stacks.py`).

    A stack becomes a volume, one pixel a voxel, with the nodule's box in the middle of the crop, filled
    with air. grey_hu: HU of grey 0 and 255, by default as the manifest says. Nodules that cannot be read are
    in `facts["failed"]`; those larger than the crop are cut, and counted in `facts["cut"]`.
    """
    job = Extraction(encoder, pool.POOLINGS, **how)
    stacks, side = read_stacks(manifest, root), job.crop_size(size)
    low, high = grey_hu or stacks.manifest.source.parameters["layout"]["grey_hu"]
    step = job.batch(side, batch)

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(stacks), step):
            part = [stacks[k] for k in range(start, min(start + step, len(stacks)))]
            yield torch.from_numpy(np.stack([centred(to_hounsfield(s, (low, high)), side) for s in part]))

    settings = {"kind": "stack", "data": stacks.fingerprint, "size": side, "grey_hu": [low, high]}
    x = job.rows(settings, lambda: {"x": job.encode(batches(), len(stacks), "nodule")})["x"]
    cut = int((stacks.extents > side).any(1).sum())
    return job.table(x, stacks.about, stacks.manifest.labels, cut=cut, **stacks.facts, **settings)


def centred(volume: np.ndarray, size: int) -> np.ndarray:
    """A cube with the box of what is not background in its middle; what is beyond its faces is cut."""
    inside = np.argwhere(volume != BACKGROUND)
    start = (inside.min(0) + inside.max(0) + 1) // 2 - size // 2  # of the cube, in the volume
    low, high = np.clip(start, 0, volume.shape), np.clip(start + size, 0, volume.shape)
    cube = np.full((size,) * 3, BACKGROUND, np.int16)
    cube[tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))] = volume[
        tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    ]
    return cube


def _images(store: Store, images: Iterable[int] | None) -> list[int]:
    chosen = list(range(len(store)) if images is None else images)
    if wrong := [i for i in chosen if not 0 <= i < len(store)]:
        raise UseError("no such image", path=store.path, found=wrong[0], expected=f"0 to {len(store) - 1}")
    if not chosen:
        raise DataError("no images", path=store.path, fix="check the split and failures.csv")
    return [int(i) for i in chosen]


def _scan(
    store: Store, image: int, spacing: Spacing, labels: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A whole scan, of all channels, at a voxel size -> (values, label values or zeros, affine)."""
    volume, affine = store.array(image)[:], store.affine(image)
    stored = store.labels(image) if labels else None
    values = np.zeros((1, 1, 1), np.uint8) if stored is None else stored[:]
    if same_spacing(spacing, store.spacing):
        return volume, values, affine
    shape, target = target_grid(volume.shape[-3:], affine, spacing)
    painter = LabelPainter(shape, target)
    for value in np.unique(values[values > 0]):
        painter.paint(int(value), values == value, affine)
    moved = over_channels(lambda one: rounded(resample(one, affine, shape, target, fill=AIR), one), volume)
    return moved, painter.finish(), target


def _regions(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(value, positions (n, 3)) of every label, looking only into its box."""
    for value, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            yield value, np.argwhere(labels[box] == value) + [s.start for s in box]
