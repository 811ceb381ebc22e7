"""A radiologist's hand on the viewer, in Chromium: zoom, pan, window, ruler, cine, large and thick scans, live overlays, pages."""

from __future__ import annotations

import io
from threading import Event

import numpy as np
import pytest
from PIL import Image

from benchmarks.viewer import Kernel, deliver, mount
from smartlab.viewers import Panel, masks, render, sending, view
from smartlab.viewers.scene import build
from smartlab.viewers.slices import Around, SliceViewer
from tests.browser.looking import index, pixels, readout, same, stage, windowed
from tests.browser.test_lab import shows

SHAPE, GRID, SOFT = (48, 40, 32), (6, 5, 4), (-160, 240)
RNG = np.random.default_rng(7)
IMAGE = RNG.integers(-900, 900, SHAPE).astype(np.int16)
HEADS = RNG.random((3, *GRID)) ** 4
HEADS /= HEADS.sum((1, 2, 3), keepdims=True)
MASK = RNG.random(GRID) < 0.6


@pytest.fixture
def viewer(page):
    """A scan with every overlay, none of them shown, on the page."""
    viewer = view(
        IMAGE,
        spacing=(1.0, 1.5, 3.0),
        mask=MASK,
        attention=HEADS,
        reconstruction=IMAGE * 0.8,
        labels=RNG.integers(0, 3, SHAPE),
        pick=False,
        title="A scan",
    )
    viewer.shown = []
    mount(page, viewer)
    return viewer


def under(page, plane="axial", at=(0.5, 0.5)) -> list[int]:
    """The voxel that the read-out names for a place of the stage, in parts of its size."""
    box = stage(page, plane).bounding_box()
    page.mouse.move(box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"])
    return [int(v) for v in readout(page)["voxel"].split(",")]


def matrix(page, plane="axial") -> list[float]:
    """Scale across and down, then left and top, of a slice in its stage."""
    text = page.locator(f'.smartlab-stage[data-plane="{plane}"] .smartlab-pixels').evaluate(
        "e => e.style.transform"
    )
    a, _, _, d, x, y = (float(v) for v in text[text.index("(") + 1 : -1].split(","))
    return [a, d, x, y]


def drag(page, button, start, by, plane="axial"):
    box = stage(page, plane).bounding_box()
    x, y = box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"]
    page.mouse.move(x, y)
    page.mouse.down(button=button)
    page.mouse.move(x + by[0] / 2, y + by[1] / 2)
    page.mouse.move(x + by[0], y + by[1])
    page.mouse.up(button=button)


def zoomed(page, at, turn=-600, plane="axial"):
    under(page, plane, at)
    page.keyboard.down("Control")
    page.mouse.wheel(0, turn)
    page.keyboard.up("Control")
    page.wait_for_function("() => document.querySelector('.smartlab-pixels').style.transform.length > 0")
    page.wait_for_timeout(50)


def test_zoom_keeps_what_is_under_the_pointer_and_shows_its_voxels(page, viewer, artifacts):
    at = (0.3, 0.7)
    before, scale = under(page, at=at), matrix(page)[0]
    zoomed(page, at)
    assert under(page, at=at) == before
    assert matrix(page)[0] == pytest.approx(scale * np.exp(2), rel=0.01)
    assert matrix(page)[1] == pytest.approx(matrix(page)[0] * 1.5, rel=1e-3), (
        "millimetres keep their proportions"
    )
    stage(page).screenshot(path=artifacts / "zoomed.png")
    box, seen = (
        stage(page).bounding_box(),
        np.asarray(Image.open(artifacts / "zoomed.png").convert("RGB")).astype(int),
    )
    grey = windowed(IMAGE, "axial", 16, *SOFT)
    for place in ((0.2, 0.3), (0.35, 0.8), (0.8, 0.25)):
        i, j, _ = under(page, at=place)
        shown = seen[int(place[1] * box["height"]), int(place[0] * box["width"])]
        assert np.abs(shown - grey[39 - j, 47 - i]).max() <= 2, "close up, a voxel is one square of its grey"
    for _ in range(20):
        page.keyboard.press("-")
    stage(page).focus()
    for _ in range(20):
        page.keyboard.press("-")
    assert matrix(page)[0] == pytest.approx(scale, rel=0.01) and matrix(page)[2:] == pytest.approx(
        [0, 0], abs=0.5
    )


@pytest.mark.parametrize("how", ["middle", "space"])
def test_a_drag_pans(page, viewer, how):
    zoomed(page, (0.5, 0.5))
    held = under(page, at=(0.5, 0.5))
    if how == "space":
        stage(page).focus()
        page.keyboard.down(" ")
    drag(page, "middle" if how == "middle" else "left", (0.5, 0.5), (40, -30))
    if how == "space":
        page.keyboard.up(" ")
    box = stage(page).bounding_box()
    assert under(page, at=(0.5 + 40 / box["width"], 0.5 - 30 / box["height"])) == held
    assert index(page) == 16, "the cursor stays"


def test_the_right_button_turns_the_window_and_zero_turns_all_back(page, viewer):
    zoomed(page, (0.2, 0.2))
    drag(page, "right", (0.5, 0.5), (60, -30))
    low, high = page.evaluate("model.get('window')")
    assert high - low == pytest.approx(400 * np.exp(60 / 200), abs=1)
    assert (low + high) / 2 == pytest.approx(40 + 30 * 400 / 300, abs=1)
    assert same(pixels(page), windowed(IMAGE, "axial", 16, low, high))
    numbers = page.locator(".smartlab-numbers").inner_text().split()
    assert float(numbers[1]) == pytest.approx((low + high) / 2, abs=0.6) and float(numbers[3]) == high - low
    stage(page).focus()
    page.keyboard.press("0")
    assert same(pixels(page), windowed(IMAGE, "axial", 16, *SOFT)) and matrix(page)[2:] == pytest.approx(
        [0, 0], abs=0.5
    )


def test_the_wheel_lets_the_page_go_at_the_last_slice(page, viewer):
    page.evaluate("document.body.style.paddingBottom = '2000px'")
    under(page)
    page.mouse.wheel(0, 100)
    page.wait_for_timeout(100)
    assert (index(page), page.evaluate("scrollY")) == (15, 0)
    stage(page).focus()
    page.keyboard.press("Home")
    under(page)
    page.mouse.wheel(0, 300)
    page.wait_for_function("scrollY > 0")
    assert index(page) == 0
    page.evaluate("document.body.style.paddingBottom = ''")


def test_keys_stay_alive_after_a_tool_was_used(page, viewer):
    stage(page, "coronal").click()
    at = index(page, "coronal")
    for use in (
        lambda: page.get_by_role("button", name="Hidden units").click(),
        lambda: page.get_by_label("Window", exact=True).locator("select").select_option("0"),
        lambda: page.locator("input[data-overlay=mask]").click(),
        lambda: page.get_by_role("button", name="coronal", exact=True).click(),
    ):
        use()
        page.keyboard.press("ArrowUp")
        at += 1
        assert index(page, "coronal") == at
    page.keyboard.press("m")
    assert page.evaluate("model.get('shown')") == []


def test_nothing_moves_at_800_pixels(page, viewer):
    page.set_viewport_size({"width": 800, "height": 800})
    places = set()

    def note():
        box = page.locator(".smartlab-grid").bounding_box()
        legend = page.locator(".smartlab-legend").bounding_box()
        places.add((box["y"], box["width"], box["height"], legend["y"]))

    for at in ((0.1, 0.2), (0.5, 0.5), (0.9, 0.9)):
        for plane in ("axial", "coronal", "sagittal"):
            under(page, plane, at)
            note()
    stage(page).focus()
    for key in "maelhso12345678":
        page.keyboard.press(key)
        note()
    assert len(places) == 1 and page.evaluate("document.documentElement.scrollWidth") <= 800
    page.set_viewport_size({"width": 1200, "height": 800})


def test_six_panels_keep_the_tools_in_sight(page, artifacts):
    image = RNG.integers(-900, 900, (32, 32, 32)).astype(np.int16)
    viewer = masks.compare(image, {f"strategy {i}": RNG.random((4, 4, 4)) < 0.5 for i in range(6)})
    mount(page, viewer)
    bar, last = page.locator(".smartlab-bar").bounding_box(), stage(page, "axial", 5).bounding_box()
    assert page.evaluate("scrollY") == 0 <= bar["y"] and last["y"] + last["height"] <= 800
    page.screenshot(path=artifacts / "six.png")


def test_new_overlays_travel_alone_and_leave_the_reader_where_he_was(page, viewer):
    stage(page).click(position={"x": 40, "y": 60})
    zoomed(page, (0.4, 0.4))
    stage(page).focus()
    page.keyboard.press("m")
    page.keyboard.press("3")
    before = matrix(page), page.evaluate("[model.get('cursor'), model.get('window'), model.get('shown')]")
    other = ~MASK
    viewer.update(0, mask=other, note="other units")
    assert deliver(page, viewer) < 1000
    page.wait_for_function("document.querySelector('.smartlab-panel-note').textContent === 'other units'")
    assert (
        matrix(page),
        page.evaluate("[model.get('cursor'), model.get('window'), model.get('shown')]"),
    ) == before
    look = {"window": (-300, 1300), "shown": ["mask"]}
    expected = render.paint(viewer.scene, viewer.scene.layers[0], "axial", index(page), **look)
    assert np.array_equal(viewer.scene.layers[0].mask, other) and same(pixels(page), expected)
    assert f"{other.mean():.0%} hidden" in page.locator("figcaption").first.inner_text()
    page.keyboard.press("m")
    page.keyboard.press("a")
    viewer.update(0, attention=HEADS[:1], reconstruction=False)
    deliver(page, viewer)
    page.wait_for_function("document.querySelector('button[data-overlay=reconstruction]') === null")
    assert page.get_by_label("Attention head").locator("option").count() == 2
    look["shown"] = ["attention"]
    expected = render.paint(viewer.scene, viewer.scene.layers[0], "axial", index(page), **look)
    assert same(pixels(page), expected)
    assert viewer.meta["heads"] == 1 and "reconstruction" not in viewer.meta["overlays"]


def test_only_some_panels(page):
    viewer = view(IMAGE, panels=[Panel("a", MASK), Panel("b", ~MASK)])
    viewer.only = [1]
    mount(page, viewer)
    assert stage(page, "axial", 0).count() == 0 and stage(page, "axial", 1).count() == 1
    assert len(viewer.figure().axes) == 1


def test_a_double_click_enlarges_or_picks(page, viewer):
    stage(page, "coronal").dblclick()
    assert page.locator(".smartlab-stage").count() == 1 and stage(page, "coronal").count() == 1
    assert stage(page, "coronal").bounding_box()["height"] > 460
    stage(page, "coronal").dblclick()
    assert page.locator(".smartlab-stage").count() == 3
    picking = view(IMAGE, pick=True)
    mount(page, picking)
    box = stage(page).bounding_box()
    stage(page).dblclick(position={"x": box["width"] * 10.5 / 48, "y": box["height"] * 4.5 / 40})
    assert page.evaluate("model.get('picked')") == [47 - 10, 39 - 4, 16]
    assert page.locator(".smartlab-stage").count() == 3


@pytest.mark.parametrize("style", render.STYLES)
def test_hidden_units_as_the_student_gets_them(page, viewer, style, artifacts):
    stage(page).focus()
    page.keyboard.press("m")
    page.get_by_label("Hidden units as").select_option(style)
    look = {"window": SOFT, "shown": ["mask"], "hidden": style}
    expected = render.paint(viewer.scene, viewer.scene.layers[0], "axial", 16, **look)
    assert same(pixels(page), expected)
    hidden = render.on_slice(MASK, viewer.scene, "axial", 16)
    if style == "opaque":
        assert (pixels(page)[hidden] == render.COVER).all()
    if style == "outline":
        assert same(pixels(page), windowed(IMAGE, "axial", 16, *SOFT)), "nothing over the image but lines"
    page.locator(".smartlab-viewer").screenshot(path=artifacts / f"hidden-{style}.png")


def test_attention_is_coloured_between_two_handles_and_nowhere_below(page, viewer, artifacts):
    stage(page).focus()
    page.keyboard.press("a")
    scene = viewer.scene
    share = render.on_slice(HEADS.mean(0), scene, "axial", 16) * HEADS[0].size
    plain = windowed(IMAGE, "axial", 16, *SOFT)
    assert same(pixels(page)[share < 1], plain[share < 1]) and (share < 1).any()
    low, high, top = scene.span(-1)
    assert (low, high) == (
        1.0,
        pytest.approx(np.percentile(HEADS.mean(0) * HEADS[0].size, 99, method="lower"), abs=1e-3),
    )
    page.locator("input[data-span=from]").fill("60")
    page.locator("input[data-span=to]").fill("80")
    span = page.evaluate("model.get('span')")
    assert span == pytest.approx([0.36 * top, 0.64 * top])
    expected = render.paint(scene, scene.layers[0], "axial", 16, window=SOFT, shown=["attention"], span=span)
    assert same(pixels(page), expected)
    assert f"{span[0]:.1f}" in page.locator("[data-scale]").inner_text()
    stage(page).focus()
    page.keyboard.press("m")
    assert same(pixels(page), expected), "hidden units are hatched then, and take no colour from attention"
    page.locator(".smartlab-viewer").screenshot(path=artifacts / "attention-and-mask.png")


def test_contours_of_labels(page, viewer):
    viewer.scene.labels[:] = 0
    viewer.scene.labels[10:30, 8:30, 4:28] = 2
    mount(page, viewer)
    stage(page).focus()
    page.keyboard.press("l")
    page.keyboard.press("o")
    page.locator("input[data-overlay=labels]").fill("0")
    colour = render.label_colours()[1]
    found = (pixels(page) == colour).all(-1)
    edge = np.zeros(SHAPE[:2], bool)
    edge[10:30, 8:30], edge[11:29, 9:29] = True, False
    assert np.array_equal(found, np.flip(edge.T))
    look = {"window": SOFT, "shown": ["labels"], "opacity": {"labels": 0.0}, "contours": True}
    assert same(pixels(page), render.paint(viewer.scene, viewer.scene.layers[0], "axial", 16, **look))


def test_a_ruler_in_mm(page, viewer):
    stage(page).focus()
    page.keyboard.press("d")
    box = stage(page).bounding_box()
    for x, y in ((0.25, 0.25), (0.75, 0.5)):
        stage(page).click(position={"x": box["width"] * x, "y": box["height"] * y})
    long = float(stage(page).get_attribute("data-distance"))
    assert long == pytest.approx(np.hypot(48 * 0.5 * 1.0, 40 * 0.25 * 1.5), rel=0.01)
    assert index(page, "sagittal") == 24, "the cursor stays"
    page.keyboard.press("Escape")


def test_cine_and_full_screen(page, viewer):
    stage(page).focus()
    page.keyboard.press("c")
    start = index(page)
    page.wait_for_function(
        f"document.querySelector('.smartlab-stage').getAttribute('aria-valuenow') > {start + 2}"
    )
    assert page.get_by_role("button", name="play").get_attribute("aria-pressed") == "true"
    page.keyboard.press("c")
    rests = index(page)
    page.wait_for_timeout(300)
    assert index(page) == rests
    page.keyboard.press("f")
    page.wait_for_function("document.fullscreenElement?.classList.contains('smartlab-viewer')")
    page.keyboard.press("ArrowUp")
    assert index(page) == rests + 1
    page.keyboard.press("f")
    page.wait_for_function("document.fullscreenElement === null")


def test_a_thick_stack_is_drawn_in_true_mm_and_high_enough(page, artifacts):
    image = RNG.integers(-900, 900, (256, 256, 11)).astype(np.int16)
    mount(page, view(image, spacing=(1.4, 1.4, 2.5)))
    box = stage(page, "coronal").bounding_box()
    assert box["height"] >= 100
    across, down, *_ = matrix(page, "coronal")
    assert across / 1.4 == pytest.approx(down / 2.5, rel=1e-3)
    assert down * 11 == pytest.approx(box["height"], rel=0.02), "the whole stack is seen"
    page.screenshot(path=artifacts / "thick.png")
    stage(page).focus()
    for _ in range(30):
        page.keyboard.press("Shift+ArrowLeft")
    for _ in range(70):
        page.keyboard.press("Shift+ArrowLeft")
    i = index(page, "sagittal")
    left = matrix(page, "coronal")[2] + (255.5 - i) * across
    assert 0 <= left <= box["width"], "and the cursor stays in it"


def test_a_large_scan_comes_at_its_own_resolution_in_blocks(page, monkeypatch):
    monkeypatch.setattr(sending, "BLOCK", 24_000)
    rng = np.random.default_rng(0)
    guess, labels = (IMAGE * 0.5).astype(np.int16), rng.integers(0, 3, SHAPE)
    viewer = view(IMAGE, reconstruction=guess, labels=labels)
    viewer.shown = []
    held = sending.block
    asked, seen = [], Event()

    def block(scene, first, rows):
        seen.wait(30)
        asked.append(first // rows)
        return held(scene, first, rows)

    monkeypatch.setattr(sending, "block", block)
    Kernel.largest = 0
    mount(page, viewer)
    for plane, at in (("axial", 16), ("coronal", 20), ("sagittal", 24)):
        assert same(pixels(page, plane), windowed(IMAGE, plane, at, *SOFT)), "in sight at once"
    seen.set()
    page.wait_for_function("document.querySelector('.smartlab-viewer').dataset.loaded === '1'")
    assert Kernel.largest < 24_000 + 10_000 and len(asked) == len(set(asked)) >= 10
    assert max(abs(b - 8) for b in asked[:5]) <= 3, "nearest first"
    stage(page).focus()
    page.keyboard.press("End")
    stage(page, "coronal").focus()
    page.keyboard.press("Home")
    for plane, at in (("axial", 31), ("coronal", 0), ("sagittal", 24)):
        assert same(pixels(page, plane), windowed(IMAGE, plane, at, *SOFT))
    page.keyboard.press("r")
    page.keyboard.press("l")
    look = {"window": SOFT, "shown": ["reconstruction", "labels"]}
    assert same(pixels(page), render.paint(viewer.scene, viewer.scene.layers[0], "axial", 31, **look))


def test_another_crop_is_cut_out_of_the_scan_round_it(page):
    """Also one that reaches beyond it, and one that is asked for before the scan is there."""
    rng, labels = np.random.default_rng(3), RNG.integers(0, 3, SHAPE).astype(np.uint8)

    def crop(start):
        box = tuple(slice(16 + a, 32 + a) for a in start)
        image, told = (np.pad(a, 16, constant_values=v)[box] for a, v in ((IMAGE, -900), (labels, 0)))
        return build(image, [Panel("", rng.random((2, 2, 2)) < 0.5)], labels=told, unit=8)

    around = Around(build(IMAGE, [Panel()], labels=labels), [20, 12, 8], -900)
    viewer = SliceViewer(crop(around.start), SOFT, "all", around=around)
    viewer.shown = ["mask", "labels"]
    mount(page, viewer)
    for number, start in enumerate(([30, 20, 12], [-5, 30, 20], [40, -4, -3])):
        if number == 1:
            page.wait_for_function("document.querySelector('.smartlab-viewer').dataset.round === '1'")
        viewer.move(crop(start), start, [7, 5, 9])
        assert deliver(page, viewer) < 1500
        for plane, at in (("axial", 9), ("coronal", 5), ("sagittal", 7)):
            layer = viewer.scene.layers[0]
            shows(page, render.paint(viewer.scene, layer, plane, at, window=SOFT, shown=viewer.shown), plane)


def test_a_large_radiograph_comes_in_blocks_too(page, monkeypatch):
    monkeypatch.setattr(sending, "BLOCK", 10_000)
    image = RNG.integers(0, 4096, (150, 100)).astype(np.uint16)
    mount(page, view(image, window=(0, 4095)))
    page.wait_for_function("document.querySelector('.smartlab-viewer').dataset.loaded === '1'")
    assert same(pixels(page), np.repeat((image / 4095.0)[..., None] * 255, 3, 2))


def test_a_saved_picture_says_what_it_shows(page, viewer, artifacts):
    stage(page).focus()
    for key in "al":
        page.keyboard.press(key)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    picture = np.asarray(Image.open(io.BytesIO(download.value.path().read_bytes())).convert("RGB")).astype(
        int
    )
    download.value.save_as(artifacts / "saved-legend.png")
    box = page.locator(".smartlab-grid").bounding_box()
    assert picture.shape[0] > 2 * box["height"] + 64 + 34
    assert (picture[8:60].min(-1) < 80).any(), "its title"
    bottom = picture[-90:].reshape(-1, 3)
    assert (np.ptp(bottom, 1) > 60).any() and (bottom.max(-1) < 80).any(), "colours and words of the legend"


@pytest.mark.parametrize("large", [False, True])
def test_a_page_of_its_own_needs_no_network_and_no_kernel(browser, tmp_path, artifacts, large):
    image = np.add.outer(np.add.outer(np.arange(96), np.arange(80)), 3 * np.arange(64)).astype(np.int16)
    image = image + RNG.integers(-40, 40, image.shape).astype(np.int16)
    viewer = view(image, mask=RNG.random((12, 10, 8)) < 0.5, title="Off <line>")
    viewer.shown, viewer.cursor = [], [30, 40, 20]
    path = viewer.save_html(tmp_path / "page.html", megabytes=0.2 if large else 5)
    context, errors = browser.new_context(offline=True), []
    page = context.new_page()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:", "blob:")) else errors.append(request.url)
        ),
    )
    page.goto(path.as_uri())
    page.wait_for_selector(".smartlab-stage")
    assert page.title() == "Off <line>"
    if large:
        assert path.stat().st_size < 300_000
        assert "is the mean of" in page.locator(".smartlab-note").inner_text()
    else:
        assert same(pixels(page), windowed(image, "axial", 20, *SOFT))
    before = pixels(page)
    stage(page).hover()
    page.mouse.wheel(0, -100)
    page.wait_for_timeout(100)
    assert not same(pixels(page), before)
    stage(page).focus()
    before = pixels(page)
    page.keyboard.press("m")
    assert not same(pixels(page), before)
    page.screenshot(path=artifacts / f"page-{large}.png")
    assert errors == []
    context.close()
