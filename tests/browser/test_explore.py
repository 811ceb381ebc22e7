"""The mask explorer in JupyterLab: every control changes the pixels and the numbers, and nothing else."""

from __future__ import annotations

import statistics

import pytest
from playwright.sync_api import Error

import smartlab as sl
from benchmarks.explorer import MARK, PROMISED, WATCH
from smartlab.viewers import render
from tests.browser import example
from tests.browser.looking import index, pixels, same, stage
from tests.browser.server import run_notebook
from tests.browser.test_lab import shows, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twin(lab):
    """The same explorer here, to know what must be seen there."""
    return example.explorer(lab.folder)


@pytest.fixture(scope="module")
def page(context, lab, twin):
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=lab.url)
    page, errors = run_notebook(context, lab, "explorer")
    page.wait_for_selector(".smartlab-stage")
    stage(page).scroll_into_view_if_needed()
    yield page
    page.close()
    assert errors == [], "in the browser's console"


def expected(twin, page, plane="axial", panel=0, **look):
    """What a slice must show, by the painter of the static picture."""
    viewer = twin.viewer
    names = ("window", "shown", "opacity", "head", "hidden", "span", "contours")
    look = {**{name: getattr(viewer, name) for name in names}, **look}
    return render.paint(viewer.scene, viewer.scene.layers[panel], plane, index(page, plane, panel), **look)


def control(page, text):
    """The slider's handle, or the list, that this description stands before."""
    row = page.locator(".widget-inline-hbox", has=page.get_by_text(text, exact=True)).last
    return row.locator("select, .noUi-handle").first


def say(page, text, value):
    control(page, text).select_option(value)


def numbers(page):
    return page.locator(".smartlab-shares").inner_text()


def test_a_ratio_is_drawn_at_once_and_all_else_stays(page, twin):
    twin.set(strategy="attention_high", against="", ratio=0.7, shown="tint")
    page.keyboard.press("Escape")
    stage(page).focus()
    for key in ("2", "+", "+"):  # soft tissue, and larger
        page.keyboard.press(key)
    page.keyboard.press("ArrowUp")
    twin.viewer.window = [-160, 240]
    shows(page, expected(twin, page))
    before, at, zoom = pixels(page), index(page), view_of(page)
    handle = control(page, "ratio")
    handle.focus()
    for step in range(1, 4):
        page.keyboard.press("ArrowLeft")
        twin.set(ratio=round(0.7 - step / 100, 2))
        shows(page, expected(twin, page))
    assert not same(pixels(page), before) and index(page) == at and view_of(page) == zoom
    until(
        lambda: (
            f"{twin.numbers['hidden']['attention_high']['body']:.0%}" in numbers(page)
            and "67%" in numbers(page)
        )
    )


def view_of(page):
    """Zoom and place of the picture on the screen."""
    return (
        stage(page)
        .locator(".smartlab-pixels")
        .evaluate("e => [getComputedStyle(e).transform, e.width, e.height]")
    )


@pytest.mark.parametrize(
    "strategy", ["random", "block", "attention_hint", "attention_low", "attention_sample"]
)
def test_every_strategy_is_that_of_the_library(page, twin, strategy):
    say(page, "strategy", strategy.replace("_", " "))
    twin.set(strategy=strategy)
    shows(page, expected(twin, page))


def test_noise_and_heads_guide_where_asked(page, twin):
    say(page, "strategy", "attention high")
    say(page, "teacher", "noisy")
    twin.set(strategy="attention_high", guide="noisy")
    shows(page, expected(twin, page))
    control(page, "draw").focus()
    page.keyboard.press("ArrowRight")
    twin.set(draw=1)
    shows(page, expected(twin, page))
    say(page, "teacher", "clean")
    twin.set(guide="clean")
    for importance in ("received", "head 2", "mean"):
        say(page, "follows", importance)
        twin.set(importance=importance)
        shows(page, expected(twin, page))


@pytest.mark.parametrize("shown", ["student's view", "outline", "attention", "tint"])
def test_the_mask_is_shown_as_asked(page, twin, shown):
    say(page, "show", shown)
    twin.set(shown=shown)
    shows(page, expected(twin, page))


def test_two_strategies_stand_side_by_side(page, twin, artifacts):
    say(page, "beside it", "random")
    twin.set(against="random")
    page.wait_for_selector('.smartlab-stage[data-panel="1"]')
    for panel in (0, 1):
        shows(page, expected(twin, page, panel=panel), panel=panel)
    until(lambda: f"{twin.numbers['overlap']:.0%}" in numbers(page))
    page.screenshot(path=artifacts / "explorer.png")
    say(page, "beside it", "nothing")
    twin.set(against="")
    until(lambda: page.locator('.smartlab-stage[data-panel="1"]').count() == 0)


def test_a_double_click_moves_the_crop(page, twin):
    stage(page).focus()
    for key in ("0", "2"):  # all as at first, but soft tissue
        page.keyboard.press(key)
    box, k = stage(page).bounding_box(), index(page)
    stage(page).dblclick(position={"x": box["width"] * 19.5 / 64, "y": box["height"] * 25.5 / 64})
    twin.viewer.window = [-160, 240]
    twin.viewer.picked = [63 - 19, 63 - 25, k]

    def arrived():
        try:
            return same(pixels(page), expected(twin, page))
        except Error:  # one viewer goes, the next comes
            return False

    until(lambda: page.wait_for_timeout(50) or arrived())


def test_the_seed_plays_until_it_is_stopped(page, twin):
    say(page, "strategy", "random")
    say(page, "show", "tint")
    twin.set(strategy="random", shown="tint")
    shows(page, expected(twin, page))
    for seed in (2, 3):  # it began at 1
        if seed == 2:
            page.locator(".widget-play button").first.click()
        twin.set(seed=seed)
        shows(page, expected(twin, page))
    page.locator(".widget-play button").first.click()
    say(page, "strategy", "attention high")
    twin.set(strategy="attention_high")


def test_a_control_reaches_the_picture_within_what_we_promise(page):
    """Median of 20, the best of three rounds, as others use the machine too; `make bench` tells more."""
    page.evaluate(MARK, "ratio")
    best = 1e9
    for _ in range(3):
        keys = ["PageUp" if i % 10 < 5 else "PageDown" for i in range(20)]
        times = [page.evaluate(WATCH, ['[data-bench="ratio"]', key]) for key in keys]
        best = min(best, statistics.median(times))
    assert best < PROMISED["picture"]


def test_the_settings_can_be_copied(page, twin):
    page.get_by_role("button", name="Copy as settings").click()
    until(lambda: page.evaluate("navigator.clipboard.readText()") == " ".join(twin.settings))


@pytest.fixture(scope="module")
def saved(browser, lab, tmp_path_factory):
    """A saved page, opened from disk with the network off, and the explorer that it was saved from."""
    explorer = example.explorer(lab.folder).set(against="random")
    path = explorer.save_html(tmp_path_factory.mktemp("page") / "explorer.html")
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector(".smartlab-stage")
    yield page, explorer, path
    context.close()
    assert errors == [], "in the browser's console"


def test_a_saved_page_shows_what_the_library_would_hide(saved):
    page, explorer, path = saved
    assert 100_000 < path.stat().st_size < 5_000_000
    knob = {
        name: page.locator(f"[data-knob={name}]")
        for name in ("strategy0", "strategy1", "ratio", "seed", "look", "shown")
    }

    def see(**changes):
        explorer.set(**changes)
        for panel in range(len(explorer.masks)):
            shows(page, expected(explorer, page, panel=panel), panel=panel)
        until(lambda: f"{next(iter(explorer.numbers['hidden'].values()))['body']:.0%}" in numbers(page))

    see()
    knob["ratio"].fill("2")
    see(ratio=0.5)
    knob["seed"].fill("3")
    see(seed=3)
    for number, strategy in enumerate(sl.masking.STRATEGIES):
        knob["strategy0"].select_option(str(number))
        if strategy != "random":  # twice the same is one panel, live
            see(strategy=strategy)
    knob["look"].select_option(label="noisy, draw 1")
    see(guide="noisy", draw=1)
    knob["shown"].select_option(label="attention")
    see(shown="attention")
    assert page.get_by_label("Settings").input_value().split() == explorer.settings
    knob["strategy1"].select_option(label="nothing")
    until(lambda: page.locator('.smartlab-stage[data-panel="1"]').count() == 0)
    see(against="")
    page.get_by_role("button", name="play seeds").click()
    until(lambda: int(knob["seed"].input_value()) not in (3,))
    page.get_by_role("button", name="play seeds").click()
