"""A person's session in JupyterLab: run the notebook, look around, toggle overlays, click points."""

from __future__ import annotations

import json
import time

import nbformat
import numpy as np
import pytest

from benchmarks.viewer import large
from smartlab import read_volume
from smartlab.viewers import render, view
from tests.browser import example
from tests.browser.looking import index, pixels, readout, same, stage, windowed
from tests.browser.server import run_notebook

pytestmark = pytest.mark.slow
SOFT = (-160, 240)


@pytest.fixture(scope="module")
def scan(lab):
    return example.scan(lab.folder)


def test_a_session_with_one_panel(context, lab, scan, artifacts):
    page, errors = run_notebook(context, lab, "single")
    page.wait_for_selector(".smartlab-stage")
    stage(page).scroll_into_view_if_needed()
    page.screenshot(path=artifacts / "lab.png")
    wheel_key_and_slider_turn_to_the_right_slice(page, scan)
    page.locator(".smartlab-viewer").screenshot(path=artifacts / "viewer.png")
    overlays_come_and_go_by_key_and_not_the_notebooks_cells(page, scan, artifacts)
    the_read_out_is_the_array(page, scan)
    the_picture_can_be_saved(page, artifacts / "saved.png")
    the_notebook_stays_small_and_keeps_a_static_picture(page, lab.folder / "single.ipynb")
    a_dark_theme_stays_readable(page)
    page.locator(".smartlab-viewer").screenshot(path=artifacts / "dark.png")
    assert errors == [], "in the browser's console"
    page.close()


def overlaid(scan, page, **look):
    """What the axial slice must show, by the painter of the static picture."""
    viewer = view(
        scan,
        mask=example.masks()["random"],
        attention=example.attention(),
        reconstruction=example.reconstruction(scan.array),
    )
    return render.paint(viewer.scene, viewer.scene.layers[0], "axial", index(page), window=SOFT, **look)


def until(check, seconds: float = 60) -> None:
    """Wait for something that happens soon."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def shows(page, expected, plane="axial", panel=0):
    """A canvas comes to show this picture, exactly; it is drawn in the browser's next frame."""
    until(lambda: page.wait_for_timeout(20) or same(pixels(page, plane, panel), expected), 20)


def wheel_key_and_slider_turn_to_the_right_slice(page, scan):
    page.locator("button[data-overlay=mask]").click()  # off: the plain image
    middle = example.SIDE // 2
    shows(page, windowed(scan.array, "axial", middle, *SOFT))
    stage(page).hover()
    page.mouse.wheel(0, -100)
    until(lambda: index(page) == middle + 1)
    shows(page, windowed(scan.array, "axial", middle + 1, *SOFT))
    stage(page).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    until(lambda: index(page) == middle - 1)
    shows(page, windowed(scan.array, "axial", middle - 1, *SOFT))
    coronal = page.locator("figure", has=stage(page, "coronal")).locator("input.smartlab-slice")
    coronal.fill("40")
    shows(page, windowed(scan.array, "coronal", 40, *SOFT), "coronal")


def overlays_come_and_go_by_key_and_not_the_notebooks_cells(page, scan, artifacts):
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    stage(page).focus()
    plain = pixels(page)
    for key, overlay in (("m", "mask"), ("a", "attention"), ("r", "reconstruction"), ("e", "error")):
        page.keyboard.press(key)
        shows(page, overlaid(scan, page, shown=[overlay]))
        assert not same(pixels(page), plain)
        page.keyboard.press(key)
        shows(page, plain)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells, "m and a are keys of JupyterLab, too"
    page.keyboard.press("a")
    page.locator("input[data-overlay=attention]").fill("80")
    page.get_by_label("Attention head").select_option("1")
    shows(page, overlaid(scan, page, shown=["attention"], opacity={"attention": 0.8}, head=1))
    page.locator(".smartlab-viewer").screenshot(path=artifacts / "attention.png")
    page.keyboard.press("Escape")
    stage(page).focus()
    page.keyboard.press("a")


def the_read_out_is_the_array(page, scan):
    rng = np.random.default_rng(1)
    box = stage(page).bounding_box()
    attention = example.attention()
    hidden = example.masks()["random"]
    head = int(page.get_by_label("Attention head").input_value())
    for column, row in rng.integers(0, example.SIDE, (5, 2)):
        i, j, k = example.SIDE - 1 - column, example.SIDE - 1 - row, index(page)
        place = {
            "x": (column + 0.5) * box["width"] / example.SIDE,
            "y": (row + 0.5) * box["height"] / example.SIDE,
        }
        stage(page).hover(position=place)
        facts = readout(page)
        assert facts["voxel"] == f"{i}, {j}, {k}"
        assert facts["HU"] == str(scan.array[i, j, k]).replace("-", "−")
        world = scan.to_world([i, j, k])
        letters = [pair[int(v < 0)] for pair, v in zip(("RL", "AP", "SI"), world, strict=True)]
        assert (
            facts["position"]
            == "  ".join(f"{a} {abs(v):.1f}" for a, v in zip(letters, world, strict=True)) + " mm"
        )
        unit = (i // 16, j // 16, k // 16)
        share = (attention.mean(0) if head < 0 else attention[head])[unit] * attention[0].size
        assert float(facts["attention"].split()[0]) == pytest.approx(share, abs=0.0051)
        assert facts["unit"] == f"{unit[0]}, {unit[1]}, {unit[2]} {'hidden' if hidden[unit] else 'visible'}"


def the_picture_can_be_saved(page, path):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    assert download.value.suggested_filename == "one-crop.png"
    download.value.save_as(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def the_notebook_stays_small_and_keeps_a_static_picture(page, path):
    assert page.locator("img.smartlab-still").is_hidden(), "the widget has taken its place"
    page.keyboard.press("Control+s")
    # the browser's requests pass through this process: let it work while waiting
    until(lambda: page.wait_for_timeout(100) or "smartlab-still" in path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 500_000
    book = nbformat.read(path, as_version=4)
    state = json.dumps(book.metadata.get("widgets", {}))
    assert len(state) < 100_000


def a_dark_theme_stays_readable(page):
    page.evaluate("jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    page.wait_for_selector("body[data-jp-theme-name='JupyterLab Dark']", state="attached")
    page.wait_for_timeout(500)
    ink, paper = page.locator(".smartlab-viewer").evaluate(
        """e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor].map(
             (text) => text.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3)"""
    )
    assert ink - paper > 120


def test_a_kernel_at_work_does_not_hold_back_the_first_picture(context, lab, scan):
    """What is in sight has come with the widget; the rest comes when the kernel is free."""
    page, errors = run_notebook(context, lab, "busy")
    page.wait_for_selector(".smartlab-stage")
    for plane in ("axial", "coronal", "sagittal"):
        shows(page, windowed(scan.array, plane, example.SIDE // 2, *SOFT), plane)
    assert "done" not in page.locator(".jp-Notebook").inner_text().split(), "it is at work"
    page.wait_for_selector('.smartlab-viewer[data-loaded="1"]')
    stage(page).focus()
    page.keyboard.press("Home")
    shows(page, windowed(scan.array, "axial", 0, *SOFT))
    assert errors == []
    page.close()


def test_linked_panels_turn_together(context, lab, scan, artifacts):
    page, errors = run_notebook(context, lab, "linked")
    page.wait_for_selector(".smartlab-stage")
    page.locator("button[data-overlay=mask]").click()
    stage(page, panel=1).hover()
    page.mouse.wheel(0, 100)
    middle = example.SIDE // 2
    for panel in range(3):
        until(lambda panel=panel: index(page, panel=panel) == middle - 1)
        shows(page, windowed(scan.array, "axial", middle - 1, -1000, 400), panel=panel)
    page.locator("button[data-overlay=mask]").click()
    page.locator(".smartlab-viewer").screenshot(path=artifacts / "linked.png")
    assert errors == []
    page.close()


def test_a_click_on_a_point_shows_its_crop(context, lab, artifacts):
    page, errors = run_notebook(context, lab, "points")
    page.wait_for_selector(".smartlab-scatter")
    canvas = page.locator(".smartlab-scatter")
    canvas.scroll_into_view_if_needed()
    points, edge = example.points(), 14
    low, high = points.min(0), points.max(0)
    for number in (17, 42):
        box = canvas.bounding_box()
        across, up = (points[number] - low) / (high - low)
        x = edge + across * (box["width"] - 2 * edge)
        y = box["height"] - edge - up * (box["height"] - 2 * edge)
        canvas.click(position={"x": x, "y": y})
        page.wait_for_selector(f'.smartlab-crop [data-point="{number}"] .smartlab-stage')
        assert page.locator(".smartlab-tip").inner_text() == f"case {number:03d} · {example.kinds()[number]}"
        for plane in ("axial", "coronal", "sagittal"):
            shows(page, windowed(example.crop(number), plane, 12, *SOFT), plane)
    page.locator(".smartlab-viewer.smartlab-embedding").screenshot(path=artifacts / "points.png")
    assert errors == []
    page.close()


def test_a_large_scan_is_seen_soon_and_is_whole_soon_after(context, lab, artifacts):
    """512 × 512 × 300 in JupyterLab; twice the promised times, as others use the machine."""
    page, errors = run_notebook(context, lab, "large")
    page.wait_for_selector(".smartlab-stage")
    first = time.time()
    output = page.locator(".jp-OutputArea-output", has_text="began").first.inner_text()
    began = float(output.split()[-1])
    page.wait_for_selector('.smartlab-viewer[data-loaded="1"]')
    whole = time.time()
    found = {"first picture, s": round(first - began, 2), "whole, s": round(whole - began, 2)}
    (artifacts / "large.json").write_text(json.dumps(found))
    assert found["first picture, s"] < 4 and found["whole, s"] < 40, found
    stage(page).focus()
    page.keyboard.press("End")
    shows(page, windowed(large((512, 512, 300)), "axial", 299, *SOFT))
    page.locator(".smartlab-viewer").screenshot(path=artifacts / "large.png")
    assert errors == []
    page.close()


def test_a_dicom_series_at_its_own_size(real_data, context, lab, artifacts):
    page, errors = run_notebook(context, lab, "dicom")
    page.wait_for_selector('.smartlab-viewer[data-loaded="1"]')
    scan = read_volume(real_data / "ct_series" / "Pancreas-CT-CB_001")
    for axis, plane in enumerate(("sagittal", "coronal", "axial")):
        shows(page, windowed(scan.array, plane, scan.array.shape[axis] // 2, -45, 105), plane)
    page.locator(".smartlab-viewer").screenshot(path=artifacts / "dicom.png")
    stage(page).dblclick()
    assert stage(page).bounding_box()["height"] > 500, "one plane alone: its own pixels"
    page.locator(".smartlab-viewer").screenshot(path=artifacts / "dicom-alone.png")
    assert errors == []
    page.close()


def test_a_reopened_notebook_without_its_kernel_shows_the_picture_alone(context, lab, artifacts):
    page, _ = run_notebook(context, lab, "single")
    page.wait_for_selector(".smartlab-stage")
    page.keyboard.press("Control+s")
    path = lab.folder / "single.ipynb"
    until(lambda: page.wait_for_timeout(100) or "smartlab-still" in path.read_text(encoding="utf-8"))
    page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
    page.close()
    again = context.new_page()
    again.goto(lab.address("single.ipynb"), wait_until="commit")
    again.wait_for_selector("img.smartlab-still")
    again.wait_for_timeout(5000)
    assert again.locator("img.smartlab-still").is_visible()
    assert "model not found" not in again.locator(".jp-Notebook").inner_text()
    again.screenshot(path=artifacts / "reopened.png")
    again.close()
