"""The page of evidence and the results in the README say what the committed result files say."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import REPO


@pytest.fixture
def maker():
    spec = importlib.util.spec_from_file_location("make_evidence", REPO / "docs" / "make_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_number_of_the_page_is_that_of_the_result_files(maker):
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run: python docs/make_evidence.py"


def test_every_result_in_the_readme_is_that_of_the_result_files(maker):
    assert maker.README.read_text(encoding="utf-8") == maker.readme(), "run: python docs/make_evidence.py"


def test_a_verdict_is_what_its_interval_says(maker):
    for low, high, said in ((0.1, 0.3, "Supported"), (-0.3, -0.1, "Not supported"), (-0.1, 0.3, "Undecided")):
        assert maker.verdict({"low": low, "high": high}).startswith(said)
        turned = {0.1: "Not supported", -0.3: "Supported", -0.1: "Undecided"}[low]
        assert maker.verdict({"low": low, "high": high}, -1).startswith(turned)
