"""What nnU-Net measured, as a table that can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from smartlab.core.errors import DataError


def dice_table(summary: str | Path, patients: Mapping[str, str] | None = None) -> pd.DataFrame:
    """nnU-Net's summary.json as a table of segmentation for `compare`: case, patient, structure, dice.

    patients: of each case; nnU-Net knows none, so by default each case is a patient of its own.

    Structures have the names of the dataset.json above the file, where there is one. A structure that neither
    nnU-Net nor the truth has in a case has no Dice.
    """
    summary = Path(summary)
    try:
        cases = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
        rows = [
            (Path(case["reference_file"].removesuffix(".gz")).stem, value, scores["Dice"])
            for case in cases
            for value, scores in case["metrics"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "is no summary of nnU-Net", path=summary, found=f"{type(error).__name__}: {error}"
        ) from None
    dataset = next((p / "dataset.json" for p in summary.parents if (p / "dataset.json").is_file()), None)
    labels = json.loads(dataset.read_text(encoding="utf-8"))["labels"] if dataset else {}
    names = {str(tuple(v) if isinstance(v, list) else v): name for name, v in labels.items()}  # or a region
    table = pd.DataFrame(rows, columns=["case", "structure", "dice"])
    table["structure"] = [names.get(value, value) for value in table.structure]
    table.insert(1, "patient", [(patients or {}).get(case, case) for case in table.case])
    return table
