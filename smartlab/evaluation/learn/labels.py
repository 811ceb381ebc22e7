"""Whether a label can be judged, told from the manifest alone: before a scan is read or a feature computed.

What the task itself would refuse later (one class only, too few patients for the folds) is found by asking
it the same questions about a table without features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.case import Case, LabelSpec
from smartlab.data.cohort.case_table import says_missing
from smartlab.data.cohort.manifest import Manifest
from smartlab.evaluation.features.table import FeatureTable, spec_of
from smartlab.evaluation.learn.folds import make_plan, present_classes

if TYPE_CHECKING:
    from smartlab.evaluation.task import Task

CLASSED = ("binary", "multiclass", "multilabel")
KINDS = (*CLASSED, "number")
FIX = {"time": "use the task outcome", "event": "name the label of the time, for the task outcome"}


def labelled(table: FeatureTable, label: str) -> tuple[FeatureTable, np.ndarray, list[str], list[str]]:
    """Rows with this label, its values, the classes that occur and those that do not."""
    kept, y, classes = table.labelled(label)
    spec = table.specs[label]
    if spec.kind not in KINDS:
        raise UseError(
            f"label {label!r} is of kind {spec.kind}",
            expected=f"one of {', '.join(KINDS)}",
            fix="for follow-up (time and event) use `outcome`",
        )
    return kept, *present_classes(y, classes, spec)


def can_be_split(table: FeatureTable, label: str, settings: Mapping[str, Any]) -> None:
    """Refuse a label whose rows cannot be learned from and predicted."""
    kept, y, classes, _ = labelled(table, label)
    split, folds = settings.get("split", "auto"), settings.get("folds", 5)
    make_plan(kept.about, y, classes, folds=folds, split=split)


def check_name(specs: dict[str, LabelSpec], label: str, task: Task) -> None:
    """Refuse a label that there is not, or of a kind that the task does not take."""
    if (kind := spec_of(specs, label).kind) not in task.kinds:
        raise UseError(
            f"{task.name} cannot predict label {label!r}",
            found=f"kind {kind}",
            expected=f"one of {', '.join(task.kinds)}",
            fix=FIX.get(kind),
        )


def check_values(label: str, spec: LabelSpec, cases: Sequence[Case]) -> None:
    """Refuse values that do not mean what the label's kind says."""
    known = [v for c in cases if (v := c.labels.get(label)) is not None]
    values = {str(v) for value in known for v in (value if isinstance(value, list) else [value])}
    if not known:
        raise DataError(f"no case has the label {label!r}", found=f"{len(cases)} cases without")
    shown = ", ".join(map(repr, sorted(values)[:5])) + (", …" if len(values) > 5 else "")
    if spec.kind == "number" and len(values) == 2:
        raise DataError(
            f"label {label!r} is called a number and has two values",
            found=shown,
            fix=f'call it binary in the manifest: "kind": "binary", "classes": [{shown.replace(chr(39), chr(34))}]',
        )
    if spec.kind not in CLASSED or spec.classes:
        return
    if missing := sorted(filter(says_missing, values)):
        raise DataError(
            f"label {label!r} has a value that says it is missing",
            found=f"{missing[0]!r} among {shown}",
            fix="leave these cells empty, or name the classes in the manifest if it is one",
        )
    if spec.kind == "binary" and len(values) > 2:
        raise DataError(
            f"label {label!r} is called binary and has {len(values)} values",
            found=shown,
            fix="correct the odd ones, or call it multiclass in the manifest",
        )


def check_label(man: Manifest, task: Task, label: str, settings: Mapping[str, Any], lesions: bool) -> None:
    """All that can be known of a label without features. lesions: only cases with a lesion will have any."""
    check_name(man.labels, label, task)
    placed = [case for case in man.cases if case.lesion]
    cases = placed if lesions and placed else man.cases
    check_values(label, man.labels[label], cases)
    about = pd.DataFrame(
        {
            "case": [case.id for case in cases],
            "patient": [case.patient for case in cases],
            "split": [case.split for case in cases],
            "fold": [case.fold for case in cases],
            **{f"label:{n}": pd.Series([c.labels.get(n) for c in cases], dtype=object) for n in man.labels},
        }
    )
    assert task.ask is not None  # as every task that predicts a label has it
    task.ask(FeatureTable(np.zeros((len(cases), 1), np.float32), about, man.labels), label, settings)
