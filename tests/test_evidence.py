"""The page of evidence says what the committed result files say."""

from __future__ import annotations

import importlib.util

from tests.conftest import REPO


def test_every_number_of_the_page_is_that_of_the_result_files():
    spec = importlib.util.spec_from_file_location("make_evidence", REPO / "docs" / "make_evidence.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run: python docs/make_evidence.py"
