"""The units of scans on the grids of an encoder's stages: their features, and which organs they hold.

Beside the encoder's features of a unit stand those that any claim must beat: `random`, the same architecture
with fresh weights; `intensity`, mean and spread of HU; `position`, its place in the scan, which alone tells
much of an anatomy. A stage is 0 to 4 (of Swin strides 2 to 32 with patches of 2), or None for the semantic tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.case import LabelSpec
from smartlab.data.crops.regions import is_lesion
from smartlab.data.store.store import Store
from smartlab.evaluation.features.encoders import EncoderSource, as_encoder, random_encoder
from smartlab.evaluation.features.grids import scans, unit_counts
from smartlab.evaluation.features.table import FeatureTable
from smartlab.models.encoder import AnyEncoder

if TYPE_CHECKING:
    import pandas as pd

FEATURES = ("encoder", "random", "intensity", "position")
Stage = int | None


class Units(NamedTuple):
    """The units of one scan that hold any of its voxels, on one grid."""

    features: dict[str, np.ndarray]  # name -> (units, C) float32
    counts: np.ndarray  # (units, 1 + organs): voxels of background and of every organ


def organs_of(store: Store) -> dict[int, str]:
    """Label value -> name of everything that is no lesion."""
    names = {value: name for value, name in store.label_names.items() if not is_lesion(name)}
    if not names:
        raise DataError(
            "the store has no labels of organs", path=store.path, fix="give masks in the manifest"
        )
    return names


def stride_of(encoder: AnyEncoder, stage: Stage) -> int:
    """Voxels per side of a unit."""
    last = len(encoder.stage_strides) - 1
    if stage is not None and not 0 <= stage <= last:
        raise UseError(f"stage={stage}", expected=f"0 to {last}, or None for the semantic tokens")
    return encoder.stride if stage is None else encoder.stage_strides[stage]


def units_of(
    nets: Mapping[str, AnyEncoder], store: Store, image: int, stages: Sequence[Stage]
) -> list[Units] | None:
    """Units of a scan on the grid of every stage, by features of some networks; None without labels.

    With several networks, also by what needs none.
    """
    stored, names = store.labels(image), organs_of(store)
    if stored is None:
        return None
    hu, labels, codes = store.array(image)[:], stored[:], np.zeros(256, np.int64)
    codes[list(names)] = np.arange(1, len(names) + 1)
    needed = [stage for stage in stages if stage is not None]
    found = {name: net.features(hu, stages=needed) for name, net in nets.items()}
    out = []
    for stage in stages:
        stride = stride_of(next(iter(nets.values())), stage)
        maps = {name: _grid(one, stage) for name, one in found.items()}  # (D, H, W, C)
        grid = next(iter(maps.values())).shape[:3]
        counts = unit_counts(labels, codes, len(names) + 1, stride, grid)
        features = {name: one.reshape(-1, one.shape[-1]) for name, one in maps.items()}
        features |= plain(hu, stride, grid) if len(nets) > 1 else {}
        inside = counts.sum(1) > 0
        kept = {name: one[inside].astype(np.float32) for name, one in features.items()}
        out.append(Units(kept, counts[inside]))
    return out


def _grid(found: dict, stage: Stage) -> np.ndarray:
    if stage is None:
        tokens = found["tokens"][0].unflatten(0, tuple(found["grid"]))
    else:
        tokens = found["stages"][stage][0].permute(1, 2, 3, 0)
    return tokens.float().cpu().numpy()


def plain(hu: np.ndarray, stride: int, grid: Sequence[int]) -> dict[str, np.ndarray]:
    """What needs no network: mean and spread of the values per unit (and channel), and its place as a share of the scan."""
    shape = hu.shape[-3:]
    pad = [(0, g * stride - n) for g, n in zip((1, *grid), (1, *shape), strict=True)]
    pad[0] = (0, 0)
    padded = torch.from_numpy(np.pad(hu.reshape(-1, *shape).astype(np.float32), pad, mode="edge"))
    mean, square = (F.avg_pool3d(v, stride).flatten(1).numpy() for v in (padded, padded**2))  # (C, N)
    ends = [np.arange(g) * stride / n for g, n in zip(grid, shape, strict=True)]
    return {
        "intensity": np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0))]).T,
        "position": np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3),
    }


def units_of_scans(
    encoder: AnyEncoder,
    store: Store,
    images: Iterable[int] | None,
    stages: Sequence[Stage],
    seed: int,
    progress: bool,
) -> tuple[pd.DataFrame, list[list[Units]]]:
    """The scans that have labels, a row each, and their units by all of `FEATURES`, stage by stage."""
    about = scans(store, images)
    nets = {"encoder": encoder, "random": random_encoder(encoder, seed).to(encoder.device)}
    bar = tqdm(about.image, desc="features", disable=not progress, mininterval=1)
    every = [units_of(nets, store, int(image), stages) for image in bar]
    known = np.array([units is not None for units in every])
    return about[known].reset_index(drop=True), [units for units in every if units is not None]


def organ_tokens(
    source: EncoderSource,
    store: Store,
    images: Iterable[int] | None = None,
    *,
    stage: Stage = None,
    minimum: float = 0.5,
    per_organ: int = 20,
    seed: int = 0,
) -> FeatureTable:
    """Token features of units that lie in one organ, for `clusters`: several rows per organ and scan.

    minimum:   share of the unit's volume that is the organ.
    per_organ: rows per organ and scan at most, drawn at random.
    """
    import pandas as pd

    names, (encoder, origin) = organs_of(store), as_encoder(source)
    stride, rng, rows, parts = stride_of(encoder, stage), np.random.default_rng(seed), [], []
    for scan in scans(store, images).to_dict("records"):
        for units in units_of({"encoder": encoder}, store, int(scan["image"]), [stage]) or ():
            for organ, name in enumerate(names.values(), 1):
                found = np.flatnonzero(units.counts[:, organ] >= minimum * stride**3)
                found = rng.permutation(found)[:per_organ]
                parts.append(units.features["encoder"][found])
                rows += [scan | {"label:organ": name}] * len(found)
    if not rows:
        raise DataError(
            f"no unit of {stride} voxels lies in an organ to {minimum:.0%}",
            path=store.path,
            fix="lower `minimum`, take an earlier `stage`, or build the store at a smaller spacing",
        )
    about = pd.DataFrame(rows)[["case", "patient", "image", "split", "fold", "label:organ"]]
    classes = [name for name in names.values() if name in set(about["label:organ"])]
    spec = LabelSpec(kind="multiclass", classes=classes)
    facts = origin | {"features": "tokens", "stage": stage, "minimum": minimum, "data": store.fingerprint}
    return FeatureTable(np.concatenate(parts), about, {"organ": spec}, facts)
