"""The table of a run in a notebook: one output, kept up to date."""

from __future__ import annotations

import nbformat
from nbclient import NotebookClient

from smartlab.training.live import clock, sparkline


def test_a_run_in_a_notebook_leaves_one_small_table(settings, tmp_path):
    """A real kernel trains; the only output that stays is the finished table, with its curves."""
    code = (
        "import smartlab as sl\n"
        f"sl.pretrain(sl.load_config('tiny', {settings!r}), {str(tmp_path / 'r')!r})\n"
        "None"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    tables = [o for o in book.cells[0].outputs if "text/html" in o.get("data", {})]
    assert len(tables) == 1
    text = tables[0]["data"]["text/html"]
    assert "step 8 of 8 · finished" in text and "hidden voxels (AMIP)" in text and "<svg" in text
    assert text.count("<img") == 1, "the newest picture of a masked view, and only that"
    assert len(text) < 200_000


def test_curves_have_words_for_those_who_cannot_see_them():
    assert "aria-label='from 1 to 3'" in sparkline([1.0, 2.0, 3.0])
    assert sparkline([0.5] * 1000).count(",") == 80


def test_times_are_said_as_people_say_them():
    assert [clock(s) for s in (45, 720, 12000, float("nan"))] == ["45 s", "12 min", "3 h 20 min", "?"]
