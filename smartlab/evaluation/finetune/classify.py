"""Classification by fine-tuning: lesions or scans, benign or malignant, by the encoder and a linear head.

The network sees lesion-centred crops and is tested on patients it has not learned from. Where no case says
where its lesion is, the middle of the lesion's mask is taken; where there is no mask either, the label is of
the scan: training draws from windows over it, and a prediction is the mean over all of them. Three ways to
start are compared: "full", "frozen" (only the head learns) and "scratch"; with all training patients,
a share of them, or k patients per class (few-shot), drawn several times.

Classes are rarely balanced. `balance="sampling"` shows every class equally often, "loss" weighs cases
instead (multi-label always does, having no one class per case). Either way the network learns a world
in which classes are equally frequent; its predictions are brought back to the frequencies of the
training cases by adding their log odds, so that probabilities mean what they say. Few-shot draws are
balanced by design: there, too, the frequencies are those of all training cases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.crops.augment import augment, window
from smartlab.data.crops.flat import is_flat
from smartlab.data.crops.views import CropDataset
from smartlab.data.store.store import Store
from smartlab.evaluation.features.cases import lesion_rows
from smartlab.evaluation.features.encoders import network_input
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.finetune import classifier, picture
from smartlab.evaluation.finetune.draws import LesionDraws, Places, crops_of, places
from smartlab.evaluation.finetune.settings import Mode, check_fractions, check_modes, make_settings
from smartlab.evaluation.finetune.trainer import Call, Lesson, device_of, hold_out
from smartlab.evaluation.judge import stats
from smartlab.evaluation.judge.compare import estimate, score
from smartlab.evaluation.judge.predictions import Part, to_table
from smartlab.evaluation.judge.report import comparisons, differences
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.learn.folds import Plan, Split, averaged, make_plan, nested, present_classes, support
from smartlab.evaluation.learn.labels import CLASSED, can_be_split
from smartlab.evaluation.task import Job, Task
from smartlab.models.encoder import AnyEncoder
from smartlab.training.requests import ranks

Balance = Literal["sampling", "loss", "none"]


@dataclass(frozen=True)
class Amount:
    """How much of the training part is learned from: a share of its patients, or k of each class."""

    fraction: float = 1.0
    shots: int | None = None

    def of(self, mode: Mode) -> str:
        """The name of a way to start with this much, "full, 25%"; with everything "full"."""
        share = "" if self.fraction == 1 else f", {100 * self.fraction:.3g}%"
        return mode + (share if self.shots is None else f", {self.shots} per class")

    def folder(self, mode: Mode, draw: int) -> str:
        share = "all" if self.fraction == 1 else f"{100 * self.fraction:g}pct"
        return f"{mode}-{share if self.shots is None else f'{self.shots}shot-draw{draw}'}"


@dataclass(frozen=True, kw_only=True)
class Trainings(Call):
    """The labelled cases, and everything that the trainings of one call share."""

    encoder: AnyEncoder
    spacing: float | None
    about: pd.DataFrame
    where: Places | None  # in each case; None: at its lesion, or a whole image
    y: np.ndarray  # (n,) positions in classes, or (n, classes) 0/1 of multi-label
    kind: str
    classes: list[str]
    balance: Balance
    augmentation: dict[str, Any]  # of `augment`

    def part(self, rows: np.ndarray) -> CropDataset:
        """The crops of some of the cases."""
        where, margin = self.where and self.where.of(rows), self.encoder.config.data.margin
        return crops_of(self.store, self.about.iloc[rows], where, self.size, self.spacing, margin)

    def owner(self, rows: np.ndarray) -> np.ndarray:
        """Which of these cases each of their crops is of, (crops,)."""
        return self.where.of(rows).case if self.where else np.arange(len(rows))

    @property
    def targets(self) -> np.ndarray:
        """(n, classes) 0/1."""
        return self.y if self.y.ndim == 2 else np.eye(len(self.classes), dtype=np.int8)[self.y]


def classify(
    encoder: AnyEncoder,
    store: Store,
    manifest: Manifest | str | Path,
    out: str | Path,
    *,
    label: str,
    modes: Sequence[Mode] = ("full",),
    fractions: Sequence[float] = (1.0,),
    shots: Sequence[int] = (),
    draws: int = 5,
    split: Split = "auto",
    folds: int = 5,
    size: int | None = None,
    spacing: float | None = None,
    balance: Balance = "sampling",
    flip: bool = True,
    intensity: float = 0.1,
    seed: int = 0,
    bootstraps: int = 2000,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Fine-tune to predict `label` of lesions, and measure on patients that were not trained on.

    out:     folder of the trainings and histories; `resume=True` goes on in it.
    label:   a binary, multiclass or multilabel label of the manifest.
    fractions: shares of the training patients, each smaller one inside the larger, stratified by label.
    shots:   also train on k patients per class, for each k, `draws` times; scored by the mean over draws.
    split:   as in `make_plan`: the manifest's split or folds, else `folds` patient folds.
    size, spacing: of the crops in voxels and mm; by default 64, of mammograms the training view, and
              the store's own voxels.
    flip, intensity: augmentation of the crops, as in `augment`.
    settings: of the training, see `Settings`.

    >>> result = classify(sl.load_encoder("runs/a"), store, "phantom-ct", "runs/a/malignancy", label="malignancy")
    >>> result.metrics["auc"]  # with modes=("full", "scratch") also "auc (scratch)", "auc minus scratch"
    """
    man = load_manifest(manifest)
    size = size or (encoder.config.data.view if is_flat(store) else 64)
    check_modes(modes, size, encoder)
    check_fractions(fractions)
    if balance not in ("sampling", "loss", "none"):
        raise UseError(f"balance={balance!r}", expected="sampling, loss or none")
    about, y, kind, classes = _cases(store, man, label)
    where, how = None, "its lesion" if about.center_mm.notna().all() else "the whole image"
    if how != "its lesion" and not is_flat(store):
        where, how = places(store, about, size, spacing)
    task = Trainings(
        encoder=encoder,
        store=store,
        size=size,
        spacing=spacing,
        about=about,
        where=where,
        y=y,
        kind=kind,
        classes=classes,
        out=Path(out),
        balance=balance,
        augmentation={"flip": flip, "intensity": intensity},
        seed=seed,
        settings=make_settings(**settings),
        resume=resume,
        progress=progress,
    )
    plan = make_plan(about, y, classes, split=split, folds=folds, seed=seed)
    facts = _facts(task) | {
        "manifest": man.name,
        "label": label,
        "split": plan.how,
        "draws": draws,
        "crops": how,
    }
    amounts = [Amount(fraction=f) for f in sorted(fractions, reverse=True)]
    amounts += [Amount(shots=k) for k in sorted(set(shots), reverse=True)]
    return _compare(task, plan, modes, amounts, draws, bootstraps, facts)


def _facts(task: Trainings) -> dict[str, Any]:
    """What a reader needs to believe the numbers."""
    crops = {"spacing": task.spacing, "balance": task.balance, **task.augmentation}
    crops |= {"margin": task.encoder.config.data.margin} if is_flat(task.store) else {}
    n = {"cases": len(task.about), "patients": int(task.about.patient.nunique())}
    return task.told(crops) | {"label_kind": task.kind, "classes": task.classes, "n": n}


def _compare(
    task: Trainings,
    plan: Plan,
    modes: Sequence[Mode],
    amounts: Sequence[Amount],
    draws: int,
    bootstraps: int,
    facts: dict[str, Any],
) -> Result:
    """Every way to start, with every amount of training patients; ways to start compared with the most."""
    runs: dict[str, str] = {}  # name on the axis -> suffix of its metrics
    estimates: dict[str, Estimate] = {}
    tables: list[pd.DataFrame] = []
    whole: dict[str, pd.DataFrame] = {}  # predictions of each way to start with the most patients
    histories: dict[str, pd.DataFrame] = {}
    for mode in modes:
        for amount in amounts:
            suffix = f" ({amount.of(mode)})" if runs else ""
            predictions = []
            for draw in range(1 if amount.shots is None else draws):
                parts, history = _predict(task, plan, mode, amount, draw)
                histories |= history if draw == 0 else {}
                table = _table(task, plan, parts)
                predictions.append(table)
                whole |= {mode: table} if amount == amounts[0] else {}
                shots = "all" if amount.shots is None else str(amount.shots)
                tables.append(table.assign(mode=mode, shots=shots, fraction=amount.fraction, draw=draw))
            found = _estimates(task, predictions, bootstraps)
            estimates |= {name + suffix: value for name, value in found.items()}
            runs[amount.of(mode)] = suffix
    pairs = [(modes[0], other) for other in modes[1:]]
    compared = comparisons(whole, task.kind, pairs, bootstraps, task.seed)
    estimates |= differences(compared, modes[0])
    facts = facts | {"comparisons": compared.to_dict("records")}
    return Result(
        "classify",
        estimates,
        pd.concat(tables, ignore_index=True),
        lambda: picture.classification(estimates, histories, runs),
        facts,
    )


def _cases(store: Store, man: Manifest, label: str) -> tuple[pd.DataFrame, np.ndarray, str, list[str]]:
    """The lesions that have the label -> (about, labels, kind, classes); see `FeatureTable.labelled`."""
    if label in man.labels and man.labels[label].kind not in ("binary", "multiclass", "multilabel"):
        raise UseError(f"label {label!r} has no classes", found=man.labels[label].kind)
    placed = store.cases[store.cases.center_mm.notna()]
    placed = placed if len(placed) else store.cases  # scans: see `places`
    about = lesion_rows(store, list(placed.index), man)
    table = FeatureTable(np.zeros((len(about), 1), np.float32), about, man.labels)
    table, y, classes = table.labelled(label)
    y, classes, _ = present_classes(y, classes, man.labels[label])
    return table.about, y, man.labels[label].kind, classes


def _predict(
    task: Trainings, plan: Plan, mode: Mode, amount: Amount, draw: int
) -> tuple[list[Part], dict[str, pd.DataFrame]]:
    """Probabilities of the predicted rows, fold by fold, and the history of every training."""
    histories: dict[str, pd.DataFrame] = {}
    name = amount.folder(mode, draw)

    def fit_and_predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        fold = f"{name}-fold{len(histories)}" if len(plan.pairs) > 1 else name
        probability, histories[fold] = _one(task, fold, train, test, mode, amount, draw)
        return probability

    return plan.run(fit_and_predict), histories


def _one(
    task: Trainings, name: str, train: np.ndarray, test: np.ndarray, mode: Mode, amount: Amount, draw: int
) -> tuple[np.ndarray, pd.DataFrame]:
    """One training -> probabilities of the test rows, and its history."""
    s = task.settings
    device, hu_window = device_of(s), task.encoder.config.data.window
    frequency = task.targets[train].mean(0)
    patients = task.about.patient.to_numpy()
    if amount.shots is None:
        train, held_out = hold_out(patients, task.y, train, task.about["split"].to_numpy(), task.seed)
        train = nested(patients, task.y, train, amount.fraction, task.seed)
        if not task.targets[train].any(0).all():
            raise DataError(
                f"a class cannot be learned from {100 * amount.fraction:.3g}% of the training patients",
                found=f"{len(train)} cases",
                fix="ask for a larger fraction",
            )
    else:  # few-shot: no cases to spare for choosing when to stop
        train, held_out = few(patients, task.targets, train, amount.shots, [task.seed, draw]), train[:0]
    share = task.targets[train].mean(0)
    by_loss = task.balance == "loss" or (task.balance == "sampling" and task.kind == "multilabel")
    by_sampling = task.balance == "sampling" and not by_loss
    draws = LesionDraws(
        task.part(train),
        s.items,
        seed=task.seed,
        weights=1 / share[task.y[train]] if by_sampling else None,
        owner=task.owner(train),
    )
    net = classifier.build(task.encoder, len(task.classes), pretrained=mode != "scratch", seed=task.seed)
    classifier.standardise(net.to(device), draws, hu_window, task.seed, task.augmentation)
    measure = classifier.measure_of(
        task.kind, torch.from_numpy(share).float().to(device) if by_loss else None
    )
    learn, stop = (torch.from_numpy(task.targets[rows]).float().to(device) for rows in (train, held_out))

    def loss(batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        x = network_input(window(batch["crop"], *hu_window))
        x = augment(x, generator, shard=ranks(), channels=True, **task.augmentation)
        return measure(net(x).float(), learn[batch["row"]])

    def said(rows: np.ndarray) -> Tensor:  # several windows of a scan count by their mean
        found = classifier.logits(net, task.part(rows), hu_window, s.batch, s.precision)
        owner = torch.from_numpy(task.owner(rows)).to(found.device)
        total = torch.zeros(len(rows), found.shape[1], device=found.device).index_add_(0, owner, found)
        return total / owner.bincount()[:, None]

    lesson = Lesson(
        model=net,
        data=draws,
        loss=loss,
        mode=mode,
        encoder=classifier.ENCODER,
        facts=_depends_on(task, train, held_out),
        validate=(lambda: -float(measure(said(held_out), stop))) if len(held_out) else None,
    )
    fitted = task.fit(name, lesson)
    learned = np.full(len(task.classes), 0.5 if task.kind == "multilabel" else 1 / len(task.classes))
    learned = share if task.balance == "none" else learned
    logits = said(test).cpu().numpy()
    return classifier.probability(task.kind, logits, learned, frequency), fitted.history


def _depends_on(task: Trainings, train: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """What a training follows from, besides its settings."""
    keys = task.about.case.to_numpy()
    return {
        "classes": task.classes,
        "told": hashlib.sha256(np.ascontiguousarray(task.y).tobytes()).hexdigest()[:16],
        "spacing": task.spacing,
        "balance": task.balance,
        "margin": task.encoder.config.data.margin if is_flat(task.store) else None,
        **task.augmentation,
        "train": keys[train].tolist(),
        "held_out": keys[held_out].tolist(),
    }


def few(
    patients: np.ndarray, targets: np.ndarray, train: np.ndarray, k: int, seed: int | list[int]
) -> np.ndarray:
    """k training rows of each class, from k different patients; those of fewer are among those of more."""
    classes, rng = targets.shape[1], np.random.default_rng(seed)
    chosen = support(patients[train], targets[train], classes, rng)
    for number, rows in enumerate(chosen, 1):
        if len(rows) < k:
            raise UseError(
                f"too few patients for {k} per class",
                found=f"{len(rows)} with class number {number}",
                fix="ask for fewer shots",
            )
    return train[np.unique(np.concatenate([rows[:k] for rows in chosen]))]


def _table(task: Trainings, plan: Plan, parts: list[Part]) -> pd.DataFrame:
    about, truth = task.about.iloc[plan.predicted], task.y[plan.predicted]
    who = list(about.case), list(about.patient)
    return to_table(task.kind, *who, truth, averaged(parts), task.classes, parts)


def _estimates(task: Trainings, predictions: list[pd.DataFrame], bootstraps: int) -> dict[str, Estimate]:
    """Scores with intervals over patients; of several draws the mean, with the interval over draws."""
    if predictions[0].patient.nunique() < 2:
        raise DataError("one test patient only", fix='use split="cross"')
    if len(predictions) == 1:
        return estimate(predictions[0], task.kind, bootstraps, task.seed)
    each = pd.DataFrame([score(one, task.kind) for one in predictions])
    known = each.loc[:, each.notna().all()]
    return {
        str(name): stats.t_interval(known[name].to_numpy()).clipped(0, 2 if name == "brier" else 1)
        for name in known
    }


class _Classify(Task):
    def run(self, job: Job, settings: Mapping[str, Any]) -> Result:
        more = {"label": job.label, "progress": job.progress, **settings}
        return classify(job.encoder, job.store, job.manifest, job.out, **more)


TASKS = {"classify": _Classify(classify, headline="auc", kinds=CLASSED, ask=can_be_split, trains=True)}
