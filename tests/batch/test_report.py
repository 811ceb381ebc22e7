"""The page of a batch, from result files as notebooks write them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image

import smartlab as sl
from smartlab.batch import records
from smartlab.batch.progress import Count, Standing
from smartlab.batch.report import write_progress, write_report
from smartlab.batch.results import effects, one_metric


def result(folder, value, **parameters):
    folder.mkdir(parents=True)
    record = {"step": "toy", "parameters": parameters, "metrics": {"score": value, "nothing": None}}
    (folder / "result.json").write_text(json.dumps(record))


def record(folder, key, step, upstream=None, state=records.DONE, error="", **settings):
    """A run of a batch as it lies in its folder."""
    folder.mkdir(parents=True)
    facts = {
        "error": error,
        "step": step,
        "key": key,
        "identity": settings.pop("identity", key),
        "state": state,
    }
    records.write(folder, facts | {"settings": settings, "upstream": upstream or {}, "seconds": 1.0})
    (folder / "result.json").write_text(json.dumps({"metrics": {"score": 1.0}}))


class Addresses(HTMLParser):
    """What a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.pictures = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert tag not in ("script", "iframe") and "style" not in given
        self.links += [given["href"]] if tag == "a" else []
        self.pictures += [given["src"]] if tag == "img" else []


@pytest.fixture
def batch(tmp_path):
    """A finished batch: two factors, two seeds, a picture per run; nothing changes `auc`, one factor `size`."""
    number = 0
    for x in (1, 2):
        for kind in ("a b", "<i> c"):
            for seed in (0, 1):
                folder = tmp_path / "toy" / f"x {x}-{number}"
                record(folder, str(number), "toy", x=x, kind=kind, seed=seed)
                Image.new("RGB", (900, 300), (x, 99, seed)).save(folder / "seen.png")
                metrics = {"score": x + seed / 9 + len(kind), "size": 10.0 * x + x * seed / 3, "auc": 0.5}
                seen = {"metrics": metrics, "figures": ["seen.png"], "captions": {"seen.png": "What it saw."}}
                (folder / "result.json").write_text(json.dumps(seen | {"headline": f"seen with {seed}"}))
                for name in ("notebook.ipynb", "log.txt"):
                    (folder / name).write_text("{}")
                number += 1
    failed = tmp_path / "toy" / "x 3-f"
    record(failed, "f", "toy", state=records.FAILED, error="cell 4: no <3> please", x=3, kind="a b", seed=0)
    (failed / "log.txt").write_text("ValueError")
    return tmp_path


def test_the_page_of_a_batch_needs_nothing_else_and_links_to_what_is_there(batch):
    write_report(batch)
    text = (batch / "report.html").read_text(encoding="utf-8")
    found = Addresses(text)
    assert not re.search(r"https?:|@import|url\(", text)
    assert all(picture.startswith("data:image/") for picture in found.pictures)
    there = [batch / unquote(link) for link in found.links]
    assert all(path.is_file() for path in there), "links are relative and hold"
    names = [path.name for path in there]
    assert names.count("notebook.ipynb") == 8 and names.count("log.txt") == 10
    assert names.count("seen.png") == 4, "a picture per combination, of one seed"
    assert "What it saw." in text and "seen with 1" in text and "x 2, kind a b, seed 1" in text
    assert "<i>" not in text and len(text) < 1_000_000


def test_a_failure_is_shown_with_its_log(batch):
    page = write_report(batch).read_text(encoding="utf-8")
    text = (batch / "report.html").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "no &lt;3&gt; please" in line)
    assert "x 3, kind a b, seed 0" in row and 'href="toy/x%203-f/log.txt"' in row
    assert "notebook.ipynb" not in row, "there is none"
    row = next(line for line in page.splitlines() if "no &lt;3&gt; please" in line)
    assert "[log](toy/x%203-f/log.txt)" in row


def test_what_a_factor_cannot_change_is_said_once_and_not_tested(batch):
    markdown = write_report(batch).read_text(encoding="utf-8")
    for text in (markdown, (batch / "report.html").read_text(encoding="utf-8")):
        plain = re.sub(r"</?code>|`", "", text)
        assert plain.count("Not affected by anything that was varied, and left out: auc.") == 1
        assert plain.count("Not affected by kind: the same to the last digit, whatever the level.") == 1
        assert "1.000" not in text and "0 [0, 0]" not in text and plain.count("auc") == 1
    found = effects(one_metric(sl.load_results(batch), "size"), "size").set_index("factor")
    assert found.value["kind"] == 0 and found.p.isna()["kind"] and found.p["x"] < 0.05


def test_a_batch_that_runs_says_how_far_it_is_and_shows_what_is_done(batch, tmp_path):
    from smartlab.batch import load_plan
    from tests.batch.toys import write_plan

    (tmp_path / "plans").mkdir()
    plan = load_plan(write_plan(tmp_path / "plans", grid={"x": [2, 1]}))
    write_progress(batch, plan, Standing([Count("toy", done=8, failed=1, waiting=3, known=[60.0] * 2)], 1))
    text = (batch / "report.html").read_text(encoding="utf-8")
    assert "8 done, 0 running, 1 failed, 3 waiting · 2 min to 4 min left" in text
    assert 'http-equiv="refresh"' in text and "no &lt;3&gt; please" in text
    assert text.index("<td>2</td><td>a b</td>") < text.index("<td>1</td><td>a b</td>"), (
        "the order of the plan"
    )
    write_report(batch, plan)
    assert "refresh" not in (batch / "report.html").read_text(encoding="utf-8")


def test_the_time_left_is_a_range_that_narrows_and_nothing_before_each_kind_has_ended():
    def left(**given):
        return Standing([Count("a", **given)], 2).left([Count("a", **given)])

    assert left(waiting=20) == "" and left(done=9, known=[60.0] * 9) == ""
    one, many = (left(waiting=20, known=[600.0] * n) for n in (1, 20))
    assert one == "32 min to 2 h 48 min" and many == "1 h 35 min to 1 h 45 min"
    assert left(running=1, known=[60.0] * 50) == "26 s to 34 s", "half of a running one is over"
    known, unknown = Count("a", waiting=2, known=[9.0]), Count("b", waiting=2)
    assert Standing([known, unknown]).left([known]) and not Standing([known, unknown]).left([known, unknown])
    assert "left" not in str(Standing([known, unknown]))


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


@pytest.mark.parametrize(
    "odd",
    [
        {"headline": None},
        {"headline": 3},
        {"figures": None},
        {"figures": ["/etc/seen.png", "../seen.png", 4]},
        {"captions": ["a"]},
        {"captions": {"seen.png": None}},
    ],
)
def test_what_a_notebook_of_ones_own_tells_oddly_costs_no_batch(batch, odd):
    path = next(batch.glob("toy/*/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    write_report(batch)
    text = (batch / "report.html").read_text(encoding="utf-8")
    assert "/etc" not in text and "../" not in text and "seen with 1" in text


def test_a_page_that_cannot_be_made_is_told_and_ends_no_batch(tmp_path, monkeypatch):
    from smartlab.batch import execute, report, run_batch
    from tests.batch.toys import write_plan

    def broken(*given, **more):
        raise AttributeError("no page today")

    monkeypatch.setattr(execute, "write_progress", broken)
    monkeypatch.setattr(report, "write_report", broken)
    done = run_batch(write_plan(tmp_path), tmp_path / "out", progress=False)
    assert done.ok and "no page today" in str(done)


def test_the_page_of_a_batch_in_which_all_failed_is_a_last_one(tmp_path):
    from smartlab.batch import run_batch
    from tests.batch.toys import write_plan

    done = run_batch(write_plan(tmp_path, parameters={"fail": "0a0"}), tmp_path / "out", progress=False)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert not done.ok and "no 0 please" in text and "refresh" not in text
