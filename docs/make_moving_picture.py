"""Make docs/images/explorer.webp: a hand turns the mask explorer in JupyterLab. `python docs/make_moving_picture.py`

A phantom is explored in headless Chromium, by a kernel of its own; every frame is what the page showed. The
pointer and the line below are added.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Locator, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from smartlab.data.phantoms import ct
from smartlab.data.phantoms.patient import affine, draw_patient
from tests.browser.conftest import QUIET, chromium
from tests.browser.server import jupyterlab, run_notebook, write_notebook

OUT = Path(__file__).parent / "images" / "explorer.webp"
WIDE, STRIP = 880, 30  # px of a frame; of the line below it
CELLS = [
    "import smartlab as sl",
    "explorer = sl.explore('scan.nii.gz', labels='nodule.nii.gz', label_names={1: 'nodule'}, size=64, window='lung',"
    " strategy='attention_high', against='random', ratio=0.7, dropout=0.7)\nexplorer",
]
POINTER = """([x, y]) => {
  const arrow = document.getElementById("hand") ?? document.body.appendChild(Object.assign(document.createElement("div"), { id: "hand" }));
  arrow.innerHTML = '<svg width="26" height="26" viewBox="0 0 20 20"><path d="M3 1v15l4-4 3 7 3-1-3-7h6z" fill="#fff" stroke="#000" stroke-width="1.3"/></svg>';
  arrow.style.cssText = `position:fixed;z-index:10000;pointer-events:none;left:${x - 3}px;top:${y - 1}px`;
}"""


class Film:
    """Frames of the explorer, each with what is being done and how long it stays."""

    def __init__(self, page: Page) -> None:
        self.page, self.frames, self.times = page, [], []  # type: ignore[var-annotated]
        self.box = page.locator(".smartlab-explorer").bounding_box()
        self.font = ImageFont.load_default(15)

    def point(self, at: Locator, x: float = 0.5, y: float = 0.5) -> None:
        box = at.bounding_box()
        assert box is not None
        self.page.evaluate(POINTER, [box["x"] + x * box["width"], box["y"] + y * box["height"]])

    def take(self, said: str, ms: int = 250) -> None:
        """A frame, once the page has drawn what was asked for."""
        self.page.wait_for_timeout(700)
        shot = Image.open(io.BytesIO(self.page.screenshot(clip=self.box))).convert("RGB")
        frame = Image.new("RGB", (WIDE, round(shot.height * WIDE / shot.width) + STRIP), "#1a2530")
        frame.paste(shot.resize((WIDE, frame.height - STRIP), Image.Resampling.LANCZOS))
        ImageDraw.Draw(frame).text((14, frame.height - STRIP / 2), said, "white", self.font, anchor="lm")
        self.frames.append(frame)
        self.times.append(ms)

    def save(self) -> None:
        first, *others = self.frames
        first.save(
            OUT, save_all=True, append_images=others, duration=self.times, loop=0, quality=72, method=6
        )
        print(f"{OUT.name}: {OUT.stat().st_size / 1e6:.2f} MB, {len(self.frames)} frames, {first.size}")


def play(film: Film) -> None:
    """What the hand does."""
    page = film.page

    def control(text: str) -> Locator:
        row = page.locator(".widget-inline-hbox", has=page.get_by_text(text, exact=True)).last
        return row.locator("select, .noUi-handle").first

    def choose(text: str, value: str, said: str, ms: int) -> None:
        film.point(control(text), 0.8)
        control(text).select_option(value)
        film.take(said, ms)

    def turn(text: str, keys: list[str], said: str) -> None:
        control(text).focus()
        for key in keys:
            page.keyboard.press(key)
            page.wait_for_timeout(100)
            film.point(control(text))
            film.take(said, 260)

    film.take("70% hidden, by attention and at random. What of the nodule (outlined) is hidden?", 1600)
    turn("ratio", ["PageDown"] * 4 + ["PageUp"] * 5, "The ratio of hidden units")
    film.times[-1] = 900
    for strategy in ("block", "attention low", "attention sample", "random"):
        choose("beside it", strategy, f"Another strategy beside it: {strategy}", 900)
    choose("teacher", "noisy", "A teacher that misses 70% of its input", 900)
    choose("show", "attention", "and what it attends to, in colour", 900)
    turn("draw", ["ArrowRight"] * 4, "Another draw of the noise, another look, another mask")
    film.times[-1] = 900
    choose("teacher", "clean", "The clean teacher again", 700)
    choose("show", "tint", "The clean teacher again", 700)
    stage = page.locator('.smartlab-stage[data-plane="axial"][data-panel="0"]')
    for x, y in ((0.24, 0.3), (0.7, 0.62)):
        film.point(stage, x, y)
        film.take("A double click moves the crop through the scan", 500)
        box = stage.bounding_box()
        assert box is not None
        stage.dblclick(position={"x": x * box["width"], "y": y * box["height"]})
        film.take("A double click moves the crop through the scan", 1100)


def prepare(folder: Path) -> None:
    """A patient with little noise and a large nodule."""
    patients = (draw_patient(0, i) for i in range(500))
    chosen = next(p for p in patients if p.noise < 14 and any(14 < n.diameter < 24 for n in p.nodules))
    made, grid = ct.render(chosen), affine(chosen, ct.DEFAULT)
    nodule = np.any(made.masks[: len(chosen.nodules)], axis=0)
    for name, array in (("scan", made.array), ("nodule", nodule.astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(array, grid), folder / f"{name}.nii.gz")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder = Path(name)
        prepare(folder)
        write_notebook(folder, "explorer", CELLS)
        browser = driver.chromium.launch(executable_path=chromium(), args=QUIET)
        with jupyterlab(folder) as lab:
            context = browser.new_context(viewport={"width": 1500, "height": 980})
            context.set_default_timeout(120_000)
            page, _ = run_notebook(context, lab, "explorer")
            page.wait_for_selector('.smartlab-viewer[data-round="1"] .smartlab-stage')
            page.locator(".smartlab-explorer").scroll_into_view_if_needed()
            page.wait_for_timeout(1500)
            film = Film(page)
            play(film)
            film.save()
        browser.close()


if __name__ == "__main__":
    main()
