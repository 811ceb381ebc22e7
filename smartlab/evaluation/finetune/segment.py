"""Segmentation by fine-tuning: what pretraining is worth when voxels are labelled.

SwinUNETR around the pretrained Swin learns from random crops (DiceCE), and whole scans of patients it
has not seen are segmented by sliding windows. Three ways to start are compared: "full" (everything is
trained), "frozen" (the encoder stands still) and "scratch" (the same network, not pretrained); and
how many training patients are used, each smaller part inside the larger.

Dice and HD95 (mm) are measured per scan and structure on the store's grid, where training, validation
and all comparisons live; the means have t intervals over patients. Predictions are written on the
source scan's own voxels (`masks.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.images.grid import three
from smartlab.data.images.readers import read_volume
from smartlab.data.store.store import Store
from smartlab.evaluation.finetune import masks, picture, segmenter
from smartlab.evaluation.finetune.draws import ForegroundCrops
from smartlab.evaluation.finetune.settings import Mode, check_fractions, check_modes, make_settings
from smartlab.evaluation.finetune.trainer import Call, Fitted, Lesson, device_of, hold_out
from smartlab.evaluation.judge import metrics
from smartlab.evaluation.judge.means import patient_means
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.learn.folds import Plan, Split, make_plan, nested
from smartlab.evaluation.task import Job, Task
from smartlab.models.encoder import Encoder
from smartlab.training.requests import shared


@dataclass(frozen=True, kw_only=True)
class Trainings(Call):
    """Everything that the trainings of one call share."""

    encoder: Encoder
    names: dict[int, str]  # value in the label volumes -> structure, those to segment
    sources: dict[int, tuple[Case, Path]]  # image -> its case and data root; empty: write no predictions
    flip: bool
    intensity: float
    overlap: float

    @property
    def table(self) -> np.ndarray:
        return segmenter.class_table(list(self.names))


def segment(
    encoder: Encoder,
    store: Store,
    manifest: Manifest | str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    labels: Sequence[str] | None = None,
    modes: Sequence[Mode] = ("full",),
    fractions: Sequence[float] = (1.0,),
    split: Split = "auto",
    folds: int = 5,
    size: int = 64,
    flip: bool = False,
    intensity: float = 0.1,
    overlap: float = 0.5,
    seed: int = 0,
    bootstraps: int = 2000,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Fine-tune to segment `labels`, and measure on patients that were not trained on.

    out:       folder of the trainings, histories and predictions; `resume=True` goes on in it.
    root:      the images of the manifest: predictions are written on their voxels. None: not written.
    labels:    structures by their names in the store; default: all organs, or all masks if there are none.
    modes:     ways to start, each trained and measured: "full", "frozen", "scratch".
    fractions: shares of the training patients.
    split:     as in `make_plan`: the manifest's split or folds, else `folds` patient folds.
    size:      side of the crops in voxels. flip: mirror crops; not where structures have sides.
    bootstraps: not needed any more, since means have t intervals; plans that give it still run.
    settings:  of the training, see `Settings`.

    >>> result = segment(sl.load_encoder("runs/a"), store, "phantom-ct", "runs/a/segment", labels=["liver"])
    >>> result.metrics["dice"], result.metrics["hd95:liver"]
    """
    man = load_manifest(manifest)
    _check(modes, fractions, size, encoder)
    names = _names(store, man, labels)
    job = Trainings(
        encoder=encoder,
        store=store,
        out=Path(out),
        names=names,
        sources={} if root is None else _sources(store, man, Path(root)),
        size=size,
        flip=flip,
        intensity=intensity,
        overlap=overlap,
        seed=seed,
        settings=make_settings(**settings),
        resume=resume,
        progress=progress,
    )
    about, unlabelled = _images(store, set(names))
    plan = make_plan(about, np.zeros(len(about)), [], split=split, folds=folds, seed=seed)
    table, histories = _every(job, about, plan, modes, sorted(fractions, reverse=True))
    estimates = _estimates(table, modes, max(fractions))
    facts = _facts(job, man, about) | {"split": plan.how, "images_without_these_labels": unlabelled}
    example = job.out / next(iter(histories)) / "example.npz"
    return Result(
        "segment", estimates, table, lambda: picture.segmentation(table, estimates, histories, example), facts
    )


def _every(
    job: Trainings, about: pd.DataFrame, plan: Plan, modes: Sequence[Mode], fractions: Sequence[float]
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """All trainings: the table of their test scans, and their histories by name."""
    tables, histories = [], {}
    for mode in modes:
        for fraction in fractions:
            for fold, (train, test) in enumerate(plan.pairs):
                name = f"{mode}-{100 * fraction:g}pct" + (f"-fold{fold}" if len(plan.pairs) > 1 else "")
                fitted, rows = _one(job, name, about, train, test, mode, fraction)
                tables.append(rows.assign(mode=mode, fraction=fraction, fold=fold))
                histories[name] = fitted.history
    return pd.concat(tables, ignore_index=True), histories


def _facts(job: Trainings, man: Manifest, about: pd.DataFrame) -> dict[str, Any]:
    """What a reader needs to believe the numbers."""
    return job.told({"flip": job.flip, "intensity": job.intensity, "overlap": job.overlap}) | {
        "manifest": man.name,
        "labels": list(job.names.values()),
        "spacing_mm": job.store.spacing,
        "n": {"images": len(about), "patients": int(about.patient.nunique())},
        "predictions": "on the voxels of the sources" if job.sources else "not written: give root",
    }


def _one(
    job: Trainings,
    name: str,
    about: pd.DataFrame,
    train: np.ndarray,
    test: np.ndarray,
    mode: Mode,
    fraction: float,
) -> tuple[Fitted, pd.DataFrame]:
    """One training and its test scans."""
    store, s, hu_window = job.store, job.settings, job.encoder.config.data.window
    official = about["split"].to_numpy()
    patients, alike = about.patient.to_numpy(), np.zeros(len(about))
    train, held_out = hold_out(patients, alike, train, official, job.seed)
    train = nested(patients, alike, train, fraction, job.seed)
    images = about.image.to_numpy()
    net = segmenter.build(job.encoder, 1 + len(job.names), pretrained=mode != "scratch", seed=job.seed)
    crops = {
        "train": ForegroundCrops(
            store, images[train], job.table, size=job.size, items=s.items, seed=job.seed
        ),
        "held out": ForegroundCrops(
            store, images[held_out], job.table, size=job.size, items=2 * len(held_out), seed=job.seed + 1
        ),
    }
    score = segmenter.score_of(
        net, crops["held out"], 1 + len(job.names), hu_window, device_of(s), s.precision
    )
    weights = segmenter.class_weights(_voxels(store, images[train], job.names))
    more: dict[str, Any] = {"flip": job.flip, "intensity": job.intensity}
    facts = more | {
        "labels": list(job.names.values()),
        "train": [int(i) for i in images[train]],
        "held_out": [int(i) for i in images[held_out]],
    }
    lesson = Lesson(
        model=net,
        data=crops["train"],
        loss=segmenter.loss_of(net, hu_window, weights=weights, **more),
        mode=mode,
        encoder=segmenter.ENCODER,
        facts=facts,
        validate=score if len(held_out) else None,
    )
    fitted = job.fit(name, lesson)

    def measured(row: Any) -> pd.DataFrame:
        return _measure(job, net, about.iloc[row], job.out / name)

    rows = shared(measured, list(test))
    return fitted, pd.concat(rows, ignore_index=True).assign(trained_on=about.patient.iloc[train].nunique())


def _measure(job: Trainings, net: torch.nn.Module, row: pd.Series, folder: Path) -> pd.DataFrame:
    """Segment one scan, write the prediction, and compare it with the truth: a row per structure."""
    image, store = int(row.image), job.store
    hu = store.array(image)[:]
    stored = store.labels(image)
    assert stored is not None  # images without labels are left out before
    probability = segmenter.probabilities(
        net,
        hu,
        job.size,
        job.encoder.config.data.window,
        overlap=job.overlap,
        precision=job.settings.precision,
    )
    said, truth = probability.argmax(0), job.table[stored[:]]
    if job.sources:
        _write(job, image, probability, folder / "predictions")
    if not (folder / "example.npz").exists():
        picture.keep_example(folder / "example.npz", hu if hu.ndim == 3 else hu[0], said, truth, store.window)
    spacing, ml = tuple(three(store.spacing).tolist()), store.voxel_mm3
    return pd.DataFrame(
        {
            "case": row.key,
            "patient": row.patient,
            "structure": name,
            "dice": metrics.dice(said == c, truth == c),
            "hd95": metrics.hd95(said == c, truth == c, spacing),
            "truth_ml": float((truth == c).sum()) * ml / 1000,
            "said_ml": float((said == c).sum()) * ml / 1000,
        }
        for c, name in enumerate(job.names.values(), 1)
    )


def _write(job: Trainings, image: int, probability: np.ndarray, folder: Path) -> None:
    """The prediction on the source's voxels: NIfTI, and DICOM SEG where the source is DICOM."""
    case, root = job.sources[image]
    path, key = case.locate(root), str(job.store.rows[image]["key"])
    tilt, modality = job.store.header["settings"]["tilt"], job.store.modality
    volume = read_volume(path, series=case.series_uid, tilt=tilt, modality=modality)
    labels = masks.to_source(probability, job.store.affine(image), volume, list(job.names))
    masks.write_nifti(folder / f"{key}.nii.gz", labels, volume)
    if masks.is_dicom(path) and labels.any():
        masks.write_seg(folder / f"{key}.seg.dcm", labels, volume, job.names, case.series_uid)


def _voxels(store: Store, images: np.ndarray, names: dict[int, str]) -> np.ndarray:
    """Voxels of background and of each structure in some images, from the store's index."""
    total = sum(int(np.prod(store.shape(int(i)))) for i in images)
    found = [labels["voxels"] for i in images if (labels := store.rows[int(i)]["labels"])]
    each = [sum(int(voxels.get(str(value), 0)) for voxels in found) for value in names]
    return np.array([total - sum(each), *each], float)


def _estimates(table: pd.DataFrame, modes: Sequence[Mode], largest: float) -> dict[str, Estimate]:
    """Means over scans with intervals over patients; the first mode on all patients has the plain names."""
    out: dict[str, Estimate] = {}
    means: dict[tuple[str, float], pd.Series] = {}
    for mode, fraction in table[["mode", "fraction"]].drop_duplicates().itertuples(index=False):
        suffix = "" if (mode, fraction) == (modes[0], largest) else f" ({mode}, {100 * fraction:.3g}%)"
        rows = table[(table["mode"] == mode) & (table.fraction == fraction)]
        columns: dict[str, pd.Series] = {}
        for kind in ("dice", "hd95"):
            wide = rows.pivot(index=["patient", "case"], columns="structure", values=kind)
            columns[kind] = wide.mean(axis="columns")
            columns |= {f"{kind}:{structure}": wide[structure] for structure in rows.structure.unique()}
        means[mode, fraction] = columns["dice"]
        patients = columns["dice"].index.get_level_values("patient").to_numpy()
        values = np.column_stack([column.to_numpy(float) for column in columns.values()])
        for name, found in zip(columns, patient_means(values, patients), strict=True):
            out[name + suffix] = found.clipped(0, 1 if name.startswith("dice") else math.inf)
    for mode in modes[1:]:  # the same scans: their differences are paired
        first, other = means[modes[0], largest], means[mode, largest]
        patients = first.index.get_level_values("patient").to_numpy()
        difference = (first - other.reindex(first.index)).to_numpy()[:, None]
        out[f"dice: {modes[0]} minus {mode}"] = patient_means(difference, patients)[0]
    return out


# ---- what there is to segment ---------------------------------------------------------------------


def _check(modes: Sequence[str], fractions: Sequence[float], size: int, encoder: Encoder) -> None:
    if getattr(encoder, "swin", None) is None:
        kind = "images" if encoder.config.flat else "scans that is no Swin of smartlab"
        raise UseError("segmentation is by SwinUNETR, of scans", found=f"an encoder of {kind}")
    check_modes(modes, size, encoder)
    if size < 2 * encoder.total:
        raise UseError(
            f"crops of {size} voxels are one token in the deepest stage, which cannot be normalised",
            expected=f"at least {2 * encoder.total}",
        )
    check_fractions(fractions)


def _names(store: Store, man: Manifest, labels: Sequence[str] | None) -> dict[int, str]:
    """Value -> name of the structures to segment, in order of value."""
    known = store.label_names
    if labels is None:
        labels = [name for name in known.values() if name in man.organs.values()] or list(known.values())
    unknown = sorted(set(labels) - set(known.values()))
    if unknown or not labels:
        raise UseError(
            "no such structure" if unknown else "there is nothing to segment",
            path=store.path,
            found=", ".join(unknown) or "a store without labels",
            expected=f"some of {', '.join(known.values())}"
            if known
            else "label maps or masks in the manifest",
        )
    return {value: name for value, name in known.items() if name in set(labels)}


def _images(store: Store, values: set[int]) -> tuple[pd.DataFrame, int]:
    """One row per image that has any of the structures, and how many images have none."""
    owners = store.cases.drop_duplicates("image").set_index("image")[["patient", "split", "fold"]]
    rows = []
    for image, row in enumerate(store.rows):
        present = {int(v) for v in row["labels"]["voxels"]} if row["labels"] else set()
        if image in owners.index and present & values:
            rows.append({"key": row["key"], "image": image, **owners.loc[image].to_dict()})
    if not rows:
        raise DataError("no image of the store has any of these structures", path=store.path)
    return pd.DataFrame(rows), len(store) - len(rows)


def _sources(store: Store, man: Manifest, root: Path) -> dict[int, tuple[Case, Path]]:
    """Image of the store -> a case of the manifest on it."""
    found, images = {}, store.cases.image.to_dict()
    for group in man.images():
        for case in group.cases:
            try:
                found[int(images[store.key_of(case)])] = case, root
                break
            except DataError:  # this case failed to build; another of the same image may have not
                continue
    return found


class _Segment(Task):
    def run(self, job: Job, settings: Mapping[str, Any]) -> Result:
        more = {"root": job.root, "progress": job.progress, **settings}
        return segment(job.encoder, job.store, job.manifest, job.out, **more)


TASKS = {"segment": _Segment(segment, headline="dice", trains=True, inside=True)}
