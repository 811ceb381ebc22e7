"""One `evaluate` for every task, encoder and dataset: from an encoder and a manifest to a `Result`.

It prepares what a task needs (an open store, features, the random-initialised encoder of the same
architecture and trivial baselines beside) and calls the task; every setting of the task goes through.

    probe, knn, fewshot   a label of the lesions (or scans), from frozen features
    outcome               an outcome of the patients
    clusters              organs in feature space
    units, unsupervised   organs from single tokens: by a linear readout, by clustering
    heads, localize       the attention itself
    classify, segment     fine-tuning
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from smartlab.core.errors import UseError
from smartlab.core.settings import DataConfig
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.images.grid import in_mm, three
from smartlab.data.store.prepare import name_data
from smartlab.data.store.store import Store
from smartlab.evaluation import task as tasks
from smartlab.evaluation.features.cases import write_keys
from smartlab.evaluation.features.encoders import EncoderSource, as_encoder, run_of
from smartlab.evaluation.judge.result import Result
from smartlab.evaluation.learn.labels import check_label, check_name
from smartlab.evaluation.task import Job, Rows, Task
from smartlab.interop.wrap import Wrapped
from smartlab.training.requests import ranks


def evaluate(
    source: EncoderSource,
    task: str,
    manifest: str | Path | Manifest | None = None,
    *,
    root: str | Path | None = None,
    store: Store | None = None,
    label: str | None = None,
    rows: Rows | None = None,
    pooling: str | None = None,
    role: str = "teacher",
    beside: bool = True,
    out: str | Path | None = None,
    phantom_cases: int | None = None,
    workers: int = 2,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Evaluate an encoder (a run, its folder, a file or name that `load_encoder` takes, the encoder itself) on a task.

    manifest: the data, as in `find_data`: a name, a path, a folder of scans; by default those of the run (of an
              encoder without a run: phantom-ct). `root` is the folder of the images where they are elsewhere, `store`
              an open store of them (else the one that was made from them is built or opened, at training's spacing).
    label:    what to predict; by default the manifest's first binary label, for organs which one it is.
    rows:     "lesion", "image", "patient", or "organ" (a row per organ and scan, from its labels); by default
              lesions where the cases have them, and organs for label="organ".
    pooling:  features as in `features.py`; by default "cls+tokens" ("tokens" for clusters).
    beside:   also a random-initialised encoder and trivial baselines, on the same folds. heads, localize,
              units and unsupervised always look at the random encoder; clusters puts it beside as "random
              features/ratio", …; fine-tuning compares with it by modes=("full", "scratch").
    out:      folder for result.json, table.csv and figure.png.
    settings: whatever else the task takes: folds=10, draws=2000, modes=("full", "scratch"), …

    >>> sl.evaluate("runs/a", "probe", "phantom-ct", label="malignancy").metrics["auc"]
    >>> sl.evaluate("runs/a", "heads", "phantom-ct", out="runs/a/evaluation/heads")
    """
    one = tasks.find(task)
    if one.trains and out is None:
        raise UseError(f"{task} trains and needs a folder", fix="give out=…")
    if label is not None and not (one.kinds or one.named):
        raise UseError(f"{task} predicts no label", found=f"label={label!r}")
    settings = one.check(settings | {"seed": seed})
    data = _data(source, manifest, root, phantom_cases)
    given, folder = name_data(data.manifest if manifest is None else manifest, data.root, progress)
    if not one.trains and label == "organ" and one.kinds and "organ" not in given.labels:
        rows = rows or "organ"
    if one.kinds:
        label = _label(one, given, label, rows, folder, settings)
    encoder, facts = as_encoder(source, role)
    check_dimensions(encoder, given)
    if one.inside:
        check_own(task, encoder)
    if one.whole:
        tasks.refuse_stacks(given)
    given = load_manifest(given, folder)
    own = encoder.config.data
    more = {"root": folder and str(folder), "spacing": own.spacing, "grey": own.grey, "workers": workers}
    by_hand = isinstance(manifest, Manifest) or given.source.kind != "phantom"  # a phantom is made anew
    job = Job(
        source=source,
        role=role,
        encoder=encoder,
        given=given,
        by_hand=by_hand,
        data=data.model_copy(update=more),
        opened=store,
        label=label,
        rows=rows,
        pooling=pooling,
        compares=beside,
        out=Path(out or "."),
        seed=seed,
        progress=progress,
    )
    if store is not None and one.stored:
        _check_spacing(task, encoder, store)
    result = one.run(job, settings)
    about = {**facts, "manifest": given.name, "headline": one.headline_of(result)}
    result.facts = {**result.facts, **about}
    if given.source.kind == "local" and job.root is not None and (keys := write_keys(given, Path(job.root))):
        result.facts["names"] = f"{keys} beside the images says which scan each key is"
    if out is not None and ranks()[0] == 0:
        result.save(out)
    return result


def _data(
    source: EncoderSource, manifest: str | Path | Manifest | None, root: str | Path | None, cases: int | None
) -> DataConfig:
    """What was asked for; else what the run was trained on, whose images may have moved to `root`."""
    run = run_of(source) if manifest is None else None
    data = run.data if run else DataConfig()
    if manifest is not None:
        data.manifest = manifest.name if isinstance(manifest, Manifest) else str(manifest)
    if cases is not None and cases != data.phantom_cases:  # another phantom than the run's
        data = data.model_copy(update={"phantom_cases": cases, "root": None, "store": None})
    return data if root is None else data.model_copy(update={"root": str(root)})


def _label(
    task: Task,
    given: Manifest,
    asked: str | None,
    rows: Rows | None,
    root: str | Path | None,
    settings: dict[str, Any],
) -> str:
    """The label, by default the first binary one; what cannot be judged is refused before any image is read."""
    if rows == "organ":
        return asked or "organ"
    label = asked or next((name for name, spec in given.labels.items() if spec.kind == "binary"), None)
    if label is None:
        known = ", ".join(given.labels) or "none"
        raise UseError(f"which label? {given.name} has no binary one", expected=f"label= one of {known}")
    check_name(given.labels, label, task)
    whole = load_manifest(given, root)
    if whole.source.kind != "phantom" and whole.all_cases:  # phantoms are drawn later, with labels of ours
        check_label(whole, task, label, settings, lesions=rows in (None, "lesion"))
    return label


def check_own(what: str, encoder: Any) -> None:
    """Refuse, before any work, another's network where one must be looked into."""
    if isinstance(encoder, Wrapped) and not (what == "segment" and encoder.swin):
        raise UseError(
            f"{what} looks into smartlab's own networks and cannot take another's",
            found=encoder.config.network,
            fix="take probe, knn, fewshot, outcome, clusters, units, unsupervised or classify",
        )


def check_dimensions(encoder: Any, given: Manifest) -> None:
    """Refuse, before any work, an encoder of images for scans, of CT for MR, of other channels, and the reverse."""
    images = encoder.config.flat
    if images != (given.modality == "MG"):
        raise UseError(
            f"an encoder of {'images' if images else 'scans'} cannot take {given.name}",
            found=f"modality {given.modality}",
            expected="mammograms (MG)" if images else "scans",
            fix=f"give a manifest of such, as manifest={'phantom-mammo' if images else 'phantom-ct'}",
        )
    trained, many = encoder.config.data.modality, encoder.in_channels
    known = encoder.config.data.channels
    other = bool(known and given.channels) and list(known) != list(given.channels)
    if not images and (other or (trained, many) != (given.modality, max(1, len(given.channels)))):
        raise UseError(
            f"this encoder cannot take {given.name}",
            found=f"{given.modality}, channels {', '.join(given.channels) or 1}",
            expected=f"{trained}, {', '.join(known) or many} channel{'s' * (many > 1)}, as in its training",
            fix="pretrain one on such data, or give others",
        )


def _check_spacing(task: str, encoder: Any, store: Store) -> None:
    """Refuse a store at another voxel size than training's: the encoder would see everything magnified."""
    wanted = encoder.config.data.spacing
    if wanted and store.spacing and np.abs(three(store.spacing) - three(wanted)).max() > 1e-3:
        raise UseError(
            f"{task} looks at voxels as they are stored",
            path=store.path,
            found=f"voxels of {in_mm(store.spacing)} mm",
            expected=f"those of training, {in_mm(wanted)} mm",
            fix="leave store out, and one of that size is built",
        )


def known_settings() -> set[str]:
    """The names of the settings of all tasks."""
    from smartlab.evaluation.finetune.settings import Settings

    own = {setting for name in tasks.TASKS for setting in tasks.find(name).settings}
    return (own - tasks.GIVEN) | Settings.model_fields.keys()
