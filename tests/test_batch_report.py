"""The page of a batch, from result files as notebooks write them."""

from __future__ import annotations

import json

import smartlab as sl
from smartlab.batch.report import write_report


def result(folder, x, value):
    folder.mkdir(parents=True)
    record = {"step": "toy", "parameters": {"x": x}, "metrics": {"score": value}}
    (folder / "result.json").write_text(json.dumps(record))


def test_results_without_any_interval_make_a_page(tmp_path):
    for x in (1, 2):
        result(tmp_path / f"run-{x}", x, 0.5 + x / 10)
    table = sl.load_results(tmp_path)
    assert list(table.value) == [0.6, 0.7] and table.low.isna().all()
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "0.6" in page and "0.7" in page and list((tmp_path / "figures").glob("toy-score-*.png"))
