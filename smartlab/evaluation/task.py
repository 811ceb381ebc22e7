"""What a task is, and what it is given. A new one: a module with its function and its `Task`, and a line in `PLACES`.

The keyword-only arguments of a task's function are its settings, in Python, on the command line and in plans;
their types say which values fit. `beside` and `label` are given by `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from smartlab.core.errors import UseError, problems_of, unknown
from smartlab.core.settings import DataConfig
from smartlab.data.cohort.manifest import Manifest
from smartlab.data.store.prepare import locate_images, prepare_store
from smartlab.data.store.store import Store
from smartlab.evaluation.features import features
from smartlab.evaluation.features.baselines import lesion_baselines, stack_baselines
from smartlab.evaluation.features.encoders import EncoderSource, random_encoder
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.features.tokens import organ_tokens
from smartlab.evaluation.judge.result import Result
from smartlab.training.requests import first_alone

PLACES = {  # the modules of the tasks
    "probe": "learn.probe",
    "knn": "learn.probe",
    "fewshot": "learn.fewshot",
    "outcome": "learn.outcome",
    "clusters": "look.clusters",
    "units": "look.units",
    "unsupervised": "look.unsupervised",
    "heads": "look.heads",
    "localize": "look.localize",
    "classify": "finetune.classify",
    "segment": "finetune.segment",
}
TASKS = tuple(PLACES)
FINE_TUNING = tuple(name for name, place in PLACES.items() if place.startswith("finetune"))
# settings of functions that are arguments of `evaluate`, or of its caller
GIVEN = {"beside", "label", "resume"}
Rows = Literal["lesion", "image", "patient", "organ"]
Settings = Mapping[str, Any]


def refuse_stacks(given: Manifest) -> None:
    if is_stacks(given):
        raise UseError(f"{given.name} holds nodules cut out, no scans: this task needs whole scans")


def is_stacks(given: Manifest) -> bool:
    """Whether a dataset is a folder of PNG stacks, which needs no store."""
    return "stacks" in given.source.parameters.get("layout", {})


def find(name: str) -> Task:
    """The task of this name, imported when needed."""
    if name not in PLACES:
        raise unknown("no task", name, TASKS)
    return import_module(f"smartlab.evaluation.{PLACES[name]}").TASKS[name]


@dataclass(frozen=True)
class Task:
    """One that looks at scans: `function(encoder, store, **settings)`.

    headline: the metric to name first, as a pattern, or several: the first that a result has.
    kinds:    of label that are predicted; none: there is nothing to predict.
    named:    whether it may be told which label to look at, without predicting it.
    ask:      (features or none, label, settings): refuses what can only fail, before any image is read.
    stored:   whether it looks at voxels as the store holds them.
    """

    function: Callable[..., Result]
    headline: str
    kinds: tuple[str, ...] = ()
    named: bool = False
    ask: Callable[[FeatureTable, str, Settings], Any] | None = None
    stored: bool = False
    whole: bool = True  # needs whole scans: nodules cut out will not do
    inside: bool = False  # looks into the network: attention, or a Swin to put a decoder on
    trains: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def settings(self) -> dict[str, Parameter]:
        found = signature(self.function).parameters
        return {name: p for name, p in found.items() if p.kind is Parameter.KEYWORD_ONLY}

    def check(self, settings: Settings) -> dict[str, Any]:
        """Settings in the types that the function declares; unknown names and values that do not fit are refused.

        What else fine-tuning takes (steps, lr, …) is checked there.
        """
        known, types, checked = self.settings, signature(self.function, eval_str=True).parameters, {}
        for name, value in settings.items():
            if name not in known or name in GIVEN - {"resume"}:
                if not self.trains:
                    raise unknown(f"{self.name} has no setting", name, sorted(known.keys() - GIVEN))
                checked[name] = value
                continue
            try:
                checked[name] = TypeAdapter(types[name].annotation).validate_python(value)
            except ValidationError as error:
                raise UseError(
                    f"{self.name}: {name}={value!r} does not fit",
                    expected=f"{known[name].annotation}",
                    fix=problems_of(error)[0].why,
                ) from None
        return checked

    def headline_of(self, result: Result) -> str | None:
        found = (m for p in self.headline.split("|") for m in result.metrics if fnmatchcase(m, p))
        return next(found, None)

    def run(self, job: Job, settings: Settings) -> Result:
        return self.function(job.encoder, job.store, progress=job.progress, **settings)


@dataclass(frozen=True)
class OnFeatures(Task):
    """One that learns from a table of features: `function(table, label, **settings)`."""

    whole: bool = False

    def run(self, job: Job, settings: Settings) -> Result:
        others, table = job.beside() if job.compares else None, job.table(job.encoder)
        result = self.function(table, job.label, beside=others, **settings)
        known = set() if job.stacks or job.rows == "organ" else job.labelled_patients()
        if missing := known - set(table.about.patient):
            result.facts["patients_without_features"] = len(missing)  # such as those without a lesion
        return result


@dataclass
class Job:
    """What one call of `evaluate` is about; what its task needs is made when first needed."""

    source: EncoderSource
    role: str
    encoder: Any
    given: Manifest
    by_hand: bool  # whether that is taken as it is: given as an object, perhaps changed, or no phantom's
    data: DataConfig
    opened: Store | None
    label: str | None
    rows: Rows | None
    pooling: str | None
    compares: bool  # with what stands beside
    out: Path  # where fine-tuning trains
    seed: int
    progress: bool

    @property
    def stacks(self) -> bool:
        return is_stacks(self.given)

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
    def manifest(self) -> Manifest:
        return self.prepared[0]

    @property
    def store(self) -> Store:
        refuse_stacks(self.given)
        return self.prepared[1]

    @property
    def root(self) -> str | Path | None:
        """The folder of the images, where it is known."""
        return self.data.root if self.opened is not None else self.located[1]

    @property
    def untrained(self) -> Any:
        return random_encoder(self.encoder, self.seed)

    @property
    def of_lesions(self) -> bool:
        """Whether a row is a lesion: by default where the cases have them."""
        return self.rows == "lesion" or (self.rows is None and bool(self.store.cases.center_mm.notna().any()))

    def table(self, encoder: Any) -> FeatureTable:
        """Features of the rows asked for."""
        if self.rows == "organ":
            return self.organs(encoder)
        how: dict[str, Any] = {"pooling": self.pooling or "cls+tokens", "progress": self.progress}
        if self.stacks:
            return features.stack_features(encoder, self.given, self._folder(), **how)
        if self.of_lesions:
            return features.lesion_features(encoder, self.store, self.manifest, **how)
        by: Literal["image", "patient"] = "patient" if self.rows == "patient" else "image"
        return features.scan_features(encoder, self.store, self.manifest, by=by, **how)

    def organs(self, encoder: Any) -> FeatureTable:
        """A row per organ and scan; of a single scan its tokens, a row per organ would be too few."""
        if len(self.store) == 1:
            return organ_tokens(encoder, self.store, seed=self.seed)
        pooling = self.pooling or "tokens"
        return features.organ_features(
            encoder, self.store, self.manifest, pooling=pooling, progress=self.progress
        )

    def beside(self) -> dict[str, FeatureTable]:
        """The random-initialised encoder, and what a ruler and a histogram know."""
        others = {"random encoder": self.table(self.untrained)}
        if self.stacks:
            others |= stack_baselines(self.given, self._folder())
        elif self.of_lesions and self.store.cases.center_mm.notna().any():
            window = self.encoder.config.data.window
            others |= lesion_baselines(self.store, self.manifest, window=window, progress=self.progress)
        return others

    def labelled_patients(self) -> set[str]:
        """Patients of the store with a case that has the label."""
        cases = self.store.cases
        return set(cases.patient[[own.get(self.label) is not None for own in cases.labels]])

    def _folder(self) -> str:
        if self.data.root is None:
            raise UseError(f"where are the images of {self.given.name}?", fix="give root=DIR (--root DIR)")
        return self.data.root
