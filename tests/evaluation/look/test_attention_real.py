"""Real scans through localize and clusters: the pipeline holds, whatever the numbers are."""

from __future__ import annotations

import numpy as np
import pytest

from smartlab import build_store, open_store
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.evaluation.features.tokens import organ_tokens
from smartlab.evaluation.look.clusters import clusters
from smartlab.evaluation.look.localize import localize
from smartlab.evaluation.look.unsupervised import unsupervised
from tests.evaluation.attention_store import small_encoder


def manifest(name: str, cases: list[Case]) -> Manifest:
    facts = {"title": name, "modality": "CT", "licence": "see the data", "citation": "-", "homepage": "-"}
    return Manifest(name=name, source=Source(kind="local"), cases=cases, **facts)


@pytest.mark.slow
def test_sarcomas_through_localize(real_data, tmp_path):
    """These scans were cut out around the tumour, so that the middle finds it: the baseline must show that."""
    ids = sorted(folder.name for folder in (real_data / "ct_sarcoma").glob("STS_*"))[:4]
    cases = [
        Case(
            id=i,
            patient=i,
            image=f"ct_sarcoma/{i}/CT_image.nii.gz",
            masks={"tumour": f"ct_sarcoma/{i}/CT_mask.nii.gz"},
        )
        for i in ids
    ]
    build_store(manifest("sarcoma", cases), real_data, tmp_path, workers=0, spacing=4.0, progress=False)
    result = localize(small_encoder(), open_store(tmp_path), progress=False, draws=200)
    assert result.facts["with_region"] == {"lesion": 4}
    assert result.metrics["lesion/auc:centre"].value > 0.9
    assert result.metrics["lesion/lift:uniform"].value == pytest.approx(1, abs=1e-4)
    assert (result.table["inside"] <= 1).all() and result.table["auc"].between(0, 1).all()


@pytest.mark.slow
def test_one_scan_with_many_organs_through_clusters(real_data, tmp_path):
    files = sorted((real_data / "ct_organs" / "example_seg").glob("*.nii.gz"))
    masks = {file.name.split(".")[0]: str(file.relative_to(real_data)) for file in files}
    case = Case(id="a", patient="a", image="ct_organs/example_ct.nii.gz", masks=masks)
    build_store(manifest("organs", [case]), real_data, tmp_path, workers=0, spacing=3.0, progress=False)
    store, encoder = open_store(tmp_path), small_encoder()
    result = clusters(organ_tokens(encoder, store, stage=1), embeddings=("pca",), draws=50)
    assert len(result.facts["classes"]) >= 30  # of 59: the rest is smaller than half a unit
    assert result.facts["notes"] == ["one patient: no intervals, no neighbours in other patients"]
    assert np.isfinite(result.metrics["features/ratio"].value)
    dice = unsupervised(encoder, store, stage=1, draws=50, progress=False)
    assert sum(name.startswith("dice:") for name in dice.metrics) == 59 + 3  # organs and baselines
    assert dice.metrics["dice"].value < dice.metrics["ceiling"].value
