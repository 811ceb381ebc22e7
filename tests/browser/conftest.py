"""A real JupyterLab on a free port, a real Chromium that may talk to nothing else, and pictures kept.

Screenshots land in $SMARTLAB_ARTIFACTS (default: pytest's temporary folder). Without Chromium these
tests fail and say how to get it; they never skip.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.browser import example
from tests.browser.server import Lab, jupyterlab, write_notebook

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.fail("the browser tests need Chromium: apt-get install chromium, then run them again")


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("SMARTLAB_ARTIFACTS") or tmp_path_factory.mktemp("artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="package")
def lab(tmp_path_factory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    example.prepare(folder)
    for name, cells in example.NOTEBOOKS.items():
        write_notebook(folder, name, cells)
    with jupyterlab(folder) as server:
        yield server


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=QUIET, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser) -> Iterator[Page]:
    """An empty page, for the front end without a notebook."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(60_000)
    yield page
    page.close()


@pytest.fixture(scope="package")
def context(browser, lab) -> Iterator[BrowserContext]:
    """Pages that reach the JupyterLab of these tests and nothing else."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(120_000)
    inside = (lab.url, lab.url.replace("http", "ws", 1), "blob:", "data:")
    context.route(lambda url: not url.startswith(inside), lambda route: route.abort())
    yield context
    context.close()
