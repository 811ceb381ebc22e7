"""The page of a batch, from result files as notebooks write them."""

from __future__ import annotations

import json

import pytest

import smartlab as sl
from smartlab.batch import records
from smartlab.batch.report import write_report


def result(folder, value, **parameters):
    folder.mkdir(parents=True)
    record = {"step": "toy", "parameters": parameters, "metrics": {"score": value, "nothing": None}}
    (folder / "result.json").write_text(json.dumps(record))


def record(folder, key, step, upstream=None, state=records.DONE, **settings):
    """A run of a batch as it lies in its folder."""
    folder.mkdir(parents=True)
    facts = {"step": step, "key": key, "identity": settings.pop("identity", key), "state": state}
    records.write(folder, facts | {"settings": settings, "upstream": upstream or {}, "seconds": 1.0})
    (folder / "result.json").write_text(json.dumps({"metrics": {"score": 1.0}}))


def test_results_without_any_interval_make_a_page(tmp_path):
    for x in (1, 2):
        result(tmp_path / f"run-{x}", 0.5 + x / 10, x=x)
    table = sl.load_results(tmp_path)
    assert list(table.value.dropna()) == [0.6, 0.7] and table.low.isna().all()
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "0.6" in page and "0.7" in page and list((tmp_path / "figures").glob("toy-score-*.png"))


def test_a_page_where_only_seeds_vary_has_numbers(tmp_path):
    for seed in (0, 1, 2):
        result(tmp_path / f"run-{seed}", 0.5 + seed / 10, seed=seed, x=1)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "## toy" in page and "0.6" in page


def test_a_run_killed_while_it_wrote_its_result_hides_no_other(tmp_path):
    record(tmp_path / "toy" / "a-1", "1", "toy", x=1)
    record(tmp_path / "toy" / "b-2", "2", "toy", state=records.RUNNING, x=2)
    (tmp_path / "toy" / "b-2" / "result.json").write_text('{"metrics": {"sc')
    assert list(sl.load_results(tmp_path).x) == [1]


def test_a_damaged_result_of_a_single_notebook_hides_no_other(tmp_path):
    for x in (1, 2):
        result(tmp_path / f"run-{x}", 0.5, x=x)
    (tmp_path / "run-2" / "result.json").write_text("[]")
    with pytest.warns(UserWarning, match=r"run-2/result\.json: is no result"):
        assert set(sl.load_results(tmp_path).x) == {1}


def test_factors_of_upstream_work_that_was_done_again_stay(tmp_path):
    """Another source of smartlab: the pretraining is there twice, its evaluation still from the first."""
    record(tmp_path / "pre" / "old-1", "1", "pre", identity="same", strategy="block")
    record(tmp_path / "probe" / "p-3", "3", "probe", {"pre": "pre/old-1"}, k=1)
    record(tmp_path / "pre" / "new-2", "2", "pre", identity="same", strategy="block")
    table = sl.load_results(tmp_path)
    assert list(table[table.step == "probe"].strategy) == ["block"]
    assert len(table[table.step == "pre"]) == 1
