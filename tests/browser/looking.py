"""Read what the viewer shows back from the page, to be compared with the arrays."""

from __future__ import annotations

import base64

import numpy as np
from playwright.sync_api import Locator, Page

READ = """([plane, panel]) => {
  const canvas = document.querySelector(`.smartlab-stage[data-plane="${plane}"][data-panel="${panel}"] .smartlab-pixels`);
  const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let text = "";
  for (let i = 0; i < data.length; i += 8192) text += String.fromCharCode(...data.subarray(i, i + 8192));
  return [width, height, btoa(text)];
}"""


def stage(page: Page, plane: str = "axial", panel: int = 0) -> Locator:
    return page.locator(f'.smartlab-stage[data-plane="{plane}"][data-panel="{panel}"]')


def pixels(page: Page, plane: str = "axial", panel: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 of one canvas."""
    width, height, text = page.evaluate(READ, [plane, panel])
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)[..., :3]


def index(page: Page, plane: str = "axial", panel: int = 0) -> int:
    return int(stage(page, plane, panel).get_attribute("aria-valuenow") or -1)


def windowed(array: np.ndarray, plane: str, at: int, low: float, high: float) -> np.ndarray:
    """(H, W, 3) 0..255: the slice as a radiologist sees it, computed without the viewer."""
    cut = np.take(array, at, {"sagittal": 0, "coronal": 1, "axial": 2}[plane])
    grey = np.clip((cut.astype(float) - low) / (high - low), 0, 1) * 255
    return np.repeat(np.flip(grey.T)[..., None], 3, 2)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Within one grey level everywhere."""
    return found.shape == expected.shape and float(np.abs(found - expected.astype(float)).max()) <= 1.0


def readout(page: Page) -> dict[str, str]:
    """The facts of the read-out: name -> text."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".smartlab-readout [data-fact]")].map(
             (e) => [e.dataset.fact, e.textContent.slice(e.dataset.fact.length).trim()]))"""
    )
