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

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from smartlab.core.config import DataConfig
from smartlab.core.errors import UseError, near
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.store.prepare import locate_images, name_data, prepare_store
from smartlab.evaluation.features.cases import write_keys
from smartlab.evaluation.features.encoders import as_encoder, random_encoder
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge.result import Result
from smartlab.evaluation.learn.labels import check_label, check_name
from smartlab.training.requests import first_alone, ranks
from smartlab.training.run import Run

if TYPE_CHECKING:
    from smartlab.data.store.store import Store
    from smartlab.evaluation.features.encoders import EncoderSource

LABELLED = ("probe", "knn", "fewshot", "outcome")
LOOKING = ("clusters", "units", "unsupervised", "heads", "localize")
FINE_TUNING = ("classify", "segment")
AS_STORED = ("heads", "localize", "units", "unsupervised")  # look at voxels as the store holds them
Rows = Literal["lesion", "image", "patient", "organ"]
TASKS = (*LABELLED, *LOOKING, *FINE_TUNING)
_PREPARED = {"beside", "label", "resume"}  # settings of tasks that are arguments here


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
    """Evaluate an encoder (a run, its folder, an exported file or the encoder itself) on a task.

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
    if task not in TASKS:
        raise UseError(f"no task {task!r}", expected=f"one of {', '.join(TASKS)}", fix=near(task, TASKS))
    if task in FINE_TUNING and out is None:
        raise UseError(f"{task} trains and needs a folder", fix="give out=…")
    if label is not None and task not in (*LABELLED, "clusters", "classify"):
        raise UseError(f"{task} predicts no label", found=f"label={label!r}")
    settings = checked(task, settings | {"seed": seed})
    data = _data(source, manifest, root, phantom_cases)
    given, folder = name_data(data.manifest if manifest is None else manifest, data.root, progress)
    if task in LABELLED or task == "classify":
        label = _checked_label(given, task, label, rows, folder, settings)
    encoder, facts = as_encoder(source, role)
    check_dimensions(encoder, given)
    if task not in LABELLED:
        _check_whole(given)
    given = load_manifest(given, folder)
    own = encoder.config.data
    more = {"root": folder and str(folder), "spacing": own.spacing, "grey": own.grey, "workers": workers}
    data = data.model_copy(update=more)
    if store is not None and task in AS_STORED:
        _check_spacing(task, encoder, store)
    if label == "organ" and "organ" not in given.labels and task in LABELLED:
        rows = rows or "organ"
    by_hand = isinstance(manifest, Manifest) or given.source.kind != "phantom"  # a phantom is made anew
    job = Job(encoder, facts, given, by_hand, data, store, rows, pooling, seed, progress)
    if task in LABELLED:
        result = _labelled(job, task, label, beside, settings)
    elif task == "clusters":
        result = _clusters(job, beside, settings | ({"label": label} if label else {}))
    elif task in FINE_TUNING:
        result = _fine_tune(job, task, label, Path(out or "."), settings)
    else:  # heads looks at all checkpoints of a run
        looked_at: EncoderSource = encoder
        if task == "heads":
            looked_at, settings["role"] = _run_of(source) or encoder, role
        result = function_of(task)(looked_at, job.store, progress=progress, **settings)
    result.facts = {**facts, "manifest": given.name, **result.facts}
    if given.source.kind == "local" and job.root is not None and (keys := write_keys(given, Path(job.root))):
        result.facts["names"] = f"{keys} beside the images says which scan each key is"
    if out is not None and ranks()[0] == 0:
        result.save(out)
    return result


def _data(
    source: EncoderSource, manifest: str | Path | Manifest | None, root: str | Path | None, cases: int | None
) -> DataConfig:
    """What was asked for; else what the run was trained on, whose images may have moved to `root`."""
    run = _run_of(source) if manifest is None else None
    data = run.data if run else DataConfig()
    if manifest is not None:
        data.manifest = manifest.name if isinstance(manifest, Manifest) else str(manifest)
    if cases is not None and cases != data.phantom_cases:  # another phantom than the run's
        data = data.model_copy(update={"phantom_cases": cases, "root": None, "store": None})
    return data if root is None else data.model_copy(update={"root": str(root)})


def _checked_label(
    given: Manifest,
    task: str,
    asked: str | None,
    rows: Rows | None,
    root: str | Path | None,
    settings: dict[str, Any],
) -> str:
    """The label, by default the first binary one; what cannot be judged is refused before any image is read."""
    if rows == "organ" or (asked == "organ" and "organ" not in given.labels and task in LABELLED):
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


def check_dimensions(encoder: Any, given: Manifest) -> None:
    """Refuse, before any work, an encoder of images for scans and one of scans for images."""
    images = encoder.config.flat
    if images != (given.modality == "MG"):
        raise UseError(
            f"an encoder of {'images' if images else 'scans'} cannot take {given.name}",
            found=f"modality {given.modality}",
            expected="mammograms (MG)" if images else "scans",
            fix=f"give a manifest of such, as manifest={'phantom-mammo' if images else 'phantom-ct'}",
        )


def _is_stacks(given: Manifest) -> bool:
    return "stacks" in given.source.parameters.get("layout", {})


def _check_whole(given: Manifest) -> None:
    if _is_stacks(given):
        raise UseError(f"{given.name} holds nodules cut out, no scans: this task needs whole scans")


def _check_spacing(task: str, encoder: Any, store: Store) -> None:
    """Refuse a store at another voxel size than training's: the encoder would see everything magnified."""
    wanted = encoder.config.data.spacing
    if wanted and store.spacing and abs(store.spacing - wanted) > 1e-3:
        raise UseError(
            f"{task} looks at voxels as they are stored",
            path=store.path,
            found=f"voxels of {store.spacing:g} mm",
            expected=f"those of training, {wanted:g} mm",
            fix="leave store out, and one of that size is built",
        )


@dataclass
class Job:
    """What the tasks of one call share, made when first needed."""

    encoder: Any
    facts: dict[str, Any]
    given: Manifest
    by_hand: bool  # whether that is taken as it is: given as an object, perhaps changed, or no phantom's
    data: DataConfig
    opened: Store | None
    rows: Rows | None
    pooling: str | None
    seed: int
    progress: bool

    @property
    def stacks(self) -> bool:
        """Whether the dataset is a folder of PNG stacks, which needs no store."""
        return _is_stacks(self.given)

    @cached_property
    def located(self) -> tuple[Manifest, Path]:
        return locate_images(self.data, self.progress, self.given if self.by_hand else None)

    @cached_property
    def prepared(self) -> tuple[Manifest, Store]:
        if self.opened is not None:
            return self.given, self.opened
        with first_alone():
            return prepare_store(self.data, self.progress, self.located)

    @property
    def root(self) -> str | Path | None:
        """The folder of the images, where it is known."""
        return self.data.root if self.opened is not None else self.located[1]

    @property
    def store(self) -> Store:
        _check_whole(self.given)
        return self.prepared[1]

    def table(self, encoder: Any) -> FeatureTable:
        """Features of the rows asked for."""
        from smartlab.evaluation.features import features

        if self.rows == "organ":
            return self.organs(encoder)
        pooling = self.pooling or "cls+tokens"
        if self.stacks:
            return features.stack_features(
                encoder, self.given, self._root(), pooling=pooling, progress=self.progress
            )
        man, store = self.prepared
        has_lesions = bool(store.cases.center_mm.notna().any())
        rows: Rows = self.rows or ("lesion" if has_lesions else "image")
        if rows == "lesion":
            return features.lesion_features(encoder, store, man, pooling=pooling, progress=self.progress)
        return features.scan_features(
            encoder,
            store,
            man,
            pooling=pooling,
            by=rows,  # type: ignore[arg-type]
            progress=self.progress,
        )

    def beside(self) -> dict[str, FeatureTable]:
        """The random-initialised encoder, and what a ruler and a histogram know."""
        from smartlab.evaluation.features.baselines import lesion_baselines, stack_baselines

        others = {"random encoder": self.table(random_encoder(self.encoder.config, self.seed))}
        if self.stacks:
            return others | stack_baselines(self.given, self._root())
        man, store = self.prepared
        if self.rows in (None, "lesion") and store.cases.center_mm.notna().any():
            window = self.encoder.config.data.window
            others |= lesion_baselines(store, man, window=window, progress=self.progress)
        return others

    def patients_with(self, label: str) -> set[str]:
        """Patients of the store with a case that has this label."""
        cases = self.prepared[1].cases
        return set(cases.patient[[own.get(label) is not None for own in cases.labels]])

    def organs(self, encoder: Any) -> FeatureTable:
        """A row per organ and scan; of a single scan its tokens, a row per organ would be too few."""
        from smartlab.evaluation.features.features import organ_features
        from smartlab.evaluation.look.unsupervised import organ_tokens

        store, man = self.store, self.prepared[0]
        if len(store) == 1:
            return organ_tokens(encoder, store, seed=self.seed)
        return organ_features(encoder, store, man, pooling=self.pooling or "tokens", progress=self.progress)

    def _root(self) -> str:
        if self.data.root is None:
            raise UseError(f"where are the images of {self.given.name}?", fix="give root=DIR (--root DIR)")
        return self.data.root


def function_of(task: str) -> Callable[..., Result]:
    """The function of a task, imported when needed."""
    room = "finetune" if task in FINE_TUNING else "look" if task in LOOKING else "learn"
    module = "probe" if task == "knn" else task
    return getattr(import_module(f"smartlab.evaluation.{room}.{module}"), task)


def known_settings() -> set[str]:
    """The names of the settings of all tasks."""
    from smartlab.evaluation.finetune.trainer import Settings

    takes = (signature(function_of(task)).parameters.values() for task in TASKS)
    own = {one.name for parameters in takes for one in parameters if one.kind is Parameter.KEYWORD_ONLY}
    return (own - _PREPARED) | Settings.model_fields.keys()


def checked(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the types that the task declares; unknown names and values that do not fit are refused.

    What else fine-tuning takes (steps, lr, …) is checked there.
    """
    function = function_of(task)
    known = {n: p for n, p in signature(function).parameters.items() if p.kind is Parameter.KEYWORD_ONLY}
    rest = any(p.kind is Parameter.VAR_KEYWORD for p in signature(function).parameters.values())
    hints = vars(sys.modules[function.__module__])
    checked = {}
    for name, value in settings.items():
        if name not in known or name in _PREPARED - {"resume"}:
            if not rest:
                mine = ", ".join(sorted(known.keys() - _PREPARED))
                raise UseError(f"{task} has no setting {name!r}", expected=f"one of {mine}")
            checked[name] = value
            continue
        try:
            checked[name] = TypeAdapter(eval(known[name].annotation, hints)).validate_python(value)
        except ValidationError as error:
            raise UseError(
                f"{task}: {name}={value!r} does not fit",
                expected=f"{known[name].annotation}",
                fix=error.errors()[0]["msg"],
            ) from None
    return checked


def _labelled(job: Job, task: str, label: str | None, beside: bool, settings: dict[str, Any]) -> Result:
    assert label is not None  # `evaluate` has chosen and checked it
    others = job.beside() if beside else None
    table = job.table(job.encoder)
    result = function_of(task)(table, label, beside=others, **settings)
    if (
        not job.stacks
        and job.rows != "organ"
        and (missing := job.patients_with(label) - set(table.about.patient))
    ):
        result.facts["patients_without_features"] = len(missing)  # such as those without a lesion
    return result


def _clusters(job: Job, beside: bool, settings: dict[str, Any]) -> Result:
    """Organs in feature space, and beside them those of a random encoder."""
    from smartlab.evaluation.look.clusters import clusters

    rows = job.organs
    if "organ" in job.given.labels:  # every image shows one organ and is a row, as in OrganMNIST3D
        job.pooling, rows = job.pooling or "tokens", job.table
    random = rows(random_encoder(job.encoder.config, job.seed)) if beside else None
    return clusters(rows(job.encoder), beside={"random": random} if random else None, **settings)


def _fine_tune(job: Job, task: str, label: str | None, out: Path, settings: dict[str, Any]) -> Result:
    store, man = job.store, job.prepared[0]
    more = {"progress": job.progress, **settings}
    if task == "classify":
        return function_of(task)(job.encoder, store, man, out, label=label, **more)
    return function_of(task)(job.encoder, store, man, out, root=job.root, **more)


def _run_of(source: EncoderSource) -> Run | None:
    """The run behind an encoder, where there is one: some tasks look at all its checkpoints."""
    if isinstance(source, (str, Path)) and (Path(source) / "config.yaml").is_file():
        return Run(source)
    return source if isinstance(source, Run) else None
