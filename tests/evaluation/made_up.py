"""Feature tables with a known truth: patients with one to four lesions, features that carry a signal."""

from __future__ import annotations

import numpy as np
import pandas as pd

from smartlab.data.cohort.case import LabelSpec
from smartlab.evaluation.features.table import FeatureTable

CLASSES = ["benign", "malignant"]
GRADES = ["low", "middle", "high"]
MARGINS = ["smooth", "spiculated", "obscured"]


def lesions(patients: int = 80, width: int = 12, signal: float = 1.0, seed: int = 0) -> FeatureTable:
    """Lesions of `patients` patients with a label of every kind, driven by one hidden number each."""
    r = np.random.default_rng(seed)
    patient = np.repeat([f"p{i:04d}" for i in range(patients)], r.integers(1, 5, patients))
    hidden = r.normal(size=len(patient))
    x = r.normal(size=(len(patient), width)).astype(np.float32)
    x[:, : width // 3 + 1] += signal * hidden[:, None]
    seen = hidden[:, None] + 0.7 * r.normal(size=(len(patient), 4))
    about = pd.DataFrame(
        {
            "case": [f"c{i}" for i in range(len(patient))],
            "patient": patient,
            "image": "",
            "split": None,
            "fold": np.nan,
            "label:malignancy": np.where(seen[:, 0] > 0.3, "malignant", "benign"),
            "label:grade": np.array(GRADES)[np.digitize(seen[:, 0], [-0.5, 0.7])],
            "label:size": 20 + 5 * seen[:, 0],
            "label:margin": [
                [m for m, yes in zip(MARGINS, row, strict=True) if yes] for row in seen[:, 1:] > [0, 0.5, 0.3]
            ],
        }
    )
    specs = {
        "malignancy": LabelSpec(kind="binary", classes=CLASSES),
        "grade": LabelSpec(kind="multiclass", classes=GRADES),
        "size": LabelSpec(kind="number"),
        "margin": LabelSpec(kind="multilabel", classes=MARGINS),
    }
    return FeatureTable(x, about, specs, {"encoder": "made up"})


def cohort(patients: int = 90, width: int = 20, seed: int = 0) -> tuple[FeatureTable, pd.DataFrame]:
    """(features with outcome and follow-up per patient, clinical covariates that carry another part)."""
    r = np.random.default_rng(seed)
    names = np.array([f"p{i:03d}" for i in range(patients)])
    image, age = r.normal(size=(2, patients))
    rows = np.repeat(np.arange(patients), r.integers(1, 4, patients))
    x = r.normal(size=(len(rows), width)).astype(np.float32)
    x[:, :6] += image[rows, None]
    event_at = r.exponential(20 * np.exp(-image - age))
    lost_at = r.uniform(5, 60, patients)
    response = image + 0.7 * age + 0.7 * r.normal(size=patients) > 0
    about = pd.DataFrame(
        {
            "case": [f"c{i}" for i in range(len(rows))],
            "patient": names[rows],
            "image": "",
            "split": None,
            "fold": np.nan,
            "label:response": np.where(response, "yes", "no")[rows],
            "label:months": np.minimum(event_at, lost_at)[rows],
            "label:progressed": (event_at <= lost_at).astype(float)[rows],
        }
    )
    specs = {
        "response": LabelSpec(kind="binary", classes=["no", "yes"]),
        "months": LabelSpec(kind="time", unit="months"),
        "progressed": LabelSpec(kind="event"),
    }
    clinic = pd.DataFrame({"patient": names, "age": 60 + 10 * age, "stage": np.where(age > 0.5, "III", "II")})
    return FeatureTable(x, about, specs), clinic


def with_labels(table: FeatureTable, **columns: object) -> FeatureTable:
    """The same table with columns of `about` replaced ("label_x" stands for "label:x")."""
    renamed = {name.replace("label_", "label:"): value for name, value in columns.items()}
    return FeatureTable(table.x, table.about.assign(**renamed), table.specs, table.facts)


def with_features(table: FeatureTable, x: np.ndarray) -> FeatureTable:
    return FeatureTable(np.asarray(x, np.float32), table.about, table.specs, table.facts)


def shuffled(table: FeatureTable, label: str, seed: int = 0) -> FeatureTable:
    """Labels of all cases in random order: features can no longer know them."""
    order = np.random.default_rng(seed).permutation(len(table))
    column = table.about[f"label:{label}"].to_numpy()[order]
    return with_labels(table, **{f"label_{label}": column})
