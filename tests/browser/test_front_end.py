"""The canvas front end in Chromium, without a notebook: pixels, keys and speed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.viewer import PROMISED, measure, mount
from smartlab.core import plots
from smartlab.viewers import masks, render, view
from tests.browser.looking import index, pixels, readout, same, stage, windowed

SHAPE, GRID = (48, 40, 32), (6, 5, 4)


@pytest.fixture(scope="module")
def full():
    """A viewer with every overlay, on an image whose axes and halves all differ."""
    rng = np.random.default_rng(0)
    image = rng.integers(-900, 900, SHAPE).astype(np.int16)
    attention = rng.random((3, *GRID))
    viewer = view(
        image,
        spacing=(1.0, 1.5, 3.0),
        mask=rng.random(GRID) < 0.6,
        attention=attention / attention.sum((1, 2, 3), keepdims=True),
        reconstruction=image * 0.8 + rng.normal(0, 30, SHAPE),
        labels=rng.integers(0, 30, SHAPE),
        window=(-350, 700),
    )
    viewer.cursor = [10, 30, 5]
    return viewer


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_slice_is_the_array_under_its_window(page, full, plane):
    full.shown = []
    mount(page, full)
    at = full.cursor[render.AXES[plane][2]]
    array = full.scene.image.raw
    assert same(pixels(page, plane), windowed(array, plane, at, -350, 700))


@pytest.mark.parametrize(
    "shown", [*([name] for name in render.OVERLAYS), list(render.OVERLAYS)], ids="+".join
)
@pytest.mark.parametrize("head", [-1, 1])
def test_overlays_look_as_in_the_static_picture(page, full, shown, head):
    full.shown, full.head = shown, head
    full.opacity = {**render.OPACITY, "mask": 0.3, "reconstruction": 0.6}
    mount(page, full)
    look = {"window": full.window, "shown": shown, "opacity": full.opacity, "head": head}
    for plane in ("axial", "coronal", "sagittal"):
        at = full.cursor[render.AXES[plane][2]]
        expected = render.paint(full.scene, full.scene.layers[0], plane, at, **look)
        plain = render.paint(full.scene, full.scene.layers[0], plane, at, window=full.window)
        assert same(pixels(page, plane), expected)
        assert not same(expected, plain)


def test_proportions_are_those_in_mm(page, full):
    mount(page, full)
    for plane, ratio in (("axial", 48 / 60), ("coronal", 48 / 96), ("sagittal", 60 / 96)):
        box = stage(page, plane).bounding_box()
        assert box["width"] / box["height"] == pytest.approx(ratio, rel=0.01)


def test_keys_move_slices_and_the_shared_cursor(page, full):
    mount(page, full)
    axial = stage(page, "axial")
    axial.focus()
    for key, slice_ in (
        ("ArrowUp", 6),
        ("ArrowLeft", 5),
        ("PageUp", 15),
        ("PageDown", 5),
        ("Home", 0),
        ("End", 31),
    ):
        page.keyboard.press(key)
        assert index(page, "axial") == slice_, key
    page.keyboard.press("Shift+ArrowLeft")  # the patient's right is on the left
    page.keyboard.press("Shift+ArrowDown")
    assert (index(page, "sagittal"), index(page, "coronal")) == (11, 29)
    assert stage(page, "axial").evaluate("e => e === document.activeElement")


def test_the_window_keys_are_the_presets(page, full):
    full.shown = []
    mount(page, full)
    stage(page, "axial").focus()
    for key, bounds in enumerate([*plots.WINDOWS.values(), (-350, 700)], 1):
        page.keyboard.press(str(key))
        assert same(pixels(page, "axial"), windowed(full.scene.image.raw, "axial", 5, *bounds)), key


def test_a_click_moves_the_cursor_of_all_panels(page):
    rng = np.random.default_rng(1)
    image = rng.integers(-900, 900, (32, 32, 32)).astype(np.int16)
    chosen = {name: rng.random((4, 4, 4)) < 0.5 for name in ("a", "b", "c")}
    viewer = masks.compare(image, chosen)
    viewer.shown = []
    mount(page, viewer)
    page.get_by_role("button", name="sagittal", exact=True).click()
    box = stage(page, "sagittal", 1).bounding_box()
    stage(page, "sagittal", 1).click(position={"x": box["width"] * 4.5 / 32, "y": box["height"] * 9.5 / 32})
    page.get_by_role("button", name="axial", exact=True).click()
    assert [index(page, "axial", panel) for panel in range(3)] == [32 - 1 - 9] * 3
    page.get_by_role("button", name="coronal", exact=True).click()
    for panel in range(3):
        assert same(pixels(page, "coronal", panel), windowed(image, "coronal", 32 - 1 - 4, -160, 240))


def test_a_2d_image_stands_as_given(page):
    image = np.random.default_rng(3).integers(0, 4096, (60, 40)).astype(np.uint16)
    viewer = view(image, window=(100, 3000), spacing=(0.5, 0.5))
    mount(page, viewer)
    assert same(pixels(page), np.repeat(np.clip((image - 100.0) / 2900, 0, 1)[..., None] * 255, 3, 2))
    box = stage(page).bounding_box()
    stage(page).hover(position={"x": box["width"] * 7.5 / 40, "y": box["height"] * 11.5 / 60})
    assert readout(page)["position"] == "row 11, column 7"
    assert readout(page)["value"] == str(image[11, 7])


def test_every_tool_has_a_name_and_states_what_it_does(page, full):
    mount(page, full)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [tabindex]")].filter(
             (e) => !(e.getAttribute("aria-label") || e.textContent.trim())).length"""
    )
    assert unnamed == 0
    axial = stage(page, "axial")
    assert axial.get_attribute("role") == "slider" and "HU" in (axial.get_attribute("aria-valuetext") or "")
    assert page.locator("button[aria-pressed=true]").count() >= 1
    assert page.get_by_label("Window", exact=True).locator("select").input_value() == "7", "the one given"
    page.keyboard.press("Tab")
    axial.focus()
    page.keyboard.press("ArrowUp")
    assert axial.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"


@pytest.mark.slow
def test_a_slice_change_is_drawn_within_what_we_promise(page):
    """From the event to the drawn image, median of 50; the best of three rounds, as others use the machine too.

    When the browser shows it is up to its frames (16.7 ms apart on an idle machine): `make bench` tells.
    """
    for _ in range(3):
        results = measure(page)
        for name in PROMISED:
            assert results[name]["changed"] == results[name]["events"] == 50, (
                "every event changes the picture"
            )
        if all(results[name]["drawn_ms"] < limit for name, limit in PROMISED.items()):
            return
    pytest.fail(f"slower than promised: {results}")
