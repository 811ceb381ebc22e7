"""How long a slice change takes in the browser: from the event to the drawn image.

    python -m benchmarks.viewer --out benchmarks/results/viewer.json

A viewer on 128³ voxels is opened in headless Chromium, with a stand-in for the notebook's side of the
widget, and turned by 50 wheel events. For each, the time until the new pixels are on the canvas
("drawn", read back from it) and until the browser has put the next frame on the screen ("shown").
Promised, as medians of "shown": under 20 ms for one panel, under 40 ms for three with overlays.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import shutil
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, sync_playwright

from smartlab.viewers.scene import Panel
from smartlab.viewers.slices import SliceViewer, packed, view

PROMISED = {"one panel": 20, "three panels with overlays": 40}  # ms
SIDE, UNIT, EVENTS = 128, 16, 50
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

MOUNT = """async ({ esm, css, state, message, buffers }) => {
  const style = document.createElement("style");
  style.textContent = css;
  document.head.append(style);
  const bytes = buffers.map((text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
  const listeners = {};
  const model = {
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; },
    save_changes: () => {},
    on: (event, act) => { (listeners[event] ??= []).push(act); },
    off: () => {},
    send: () => { for (const act of listeners["msg:custom"]) act(message, bytes); },
  };
  const module = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
  const el = document.createElement("div");
  document.body.replaceChildren(el);
  module.default.render({ model, el });
  window.model = model;
}"""

TURN = """async (events) => {
  const stage = document.querySelector(".smartlab-stage");
  const canvas = stage.querySelector(".smartlab-pixels");
  const times = { drawn: [], shown: [], changed: 0 };
  const frame = () => new Promise((done) => requestAnimationFrame(() => {
    const channel = new MessageChannel(); // its message arrives after the frame has been painted
    channel.port1.onmessage = done;
    channel.port2.postMessage(0);
  }));
  const look = () => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.reduce((a, b) => a + b, 0);
  for (let i = 0; i < events; i++) {
    const before = look();
    await frame();
    const start = performance.now();
    stage.dispatchEvent(new WheelEvent("wheel", { deltaY: i % 20 < 10 ? 100 : -100, bubbles: true, cancelable: true }));
    canvas.getContext("2d").getImageData(0, 0, 1, 1);
    times.drawn.push(performance.now() - start);
    await frame();
    times.shown.push(performance.now() - start);
    times.changed += look() !== before;
  }
  return times;
}"""


@contextmanager
def browser_page(width: int = 1300, height: int = 900) -> Iterator[Page]:
    """A page of headless Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("Chromium is missing: apt-get install chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()


def mount(page: Page, viewer: SliceViewer) -> None:
    """Draw the viewer on a page without a notebook."""
    names = ("meta", "cursor", "window", "plane", "shown", "opacity", "head")
    message, buffers = packed(viewer.scene)
    page.evaluate(
        MOUNT,
        {
            "esm": str(viewer._esm),
            "css": str(viewer._css),
            "state": {name: getattr(viewer, name) for name in names},
            "message": message,
            "buffers": [base64.b64encode(b).decode() for b in buffers],
        },
    )
    page.wait_for_selector(".smartlab-stage")


def example(panels: int) -> SliceViewer:
    """A viewer on noise of 128³: all three planes of one panel, or one plane of several with overlays."""
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 1000, (SIDE,) * 3).astype(np.int16)
    grid = (SIDE // UNIT,) * 3
    heads = rng.random((4, *grid))
    guess = image + rng.normal(0, 50, image.shape)
    if panels == 1:
        return view(image)
    chosen = [Panel(f"panel {i}", rng.random(grid) < 0.7, heads, guess) for i in range(panels)]
    labels = rng.integers(0, 17, image.shape)
    viewer = view(image, panels=chosen, labels=labels, window="lung")
    viewer.shown = ["mask", "attention", "reconstruction", "labels"]
    return viewer


def measure(page: Page) -> dict[str, Any]:
    """Medians and 90th percentiles in ms over 50 slice changes."""
    results: dict[str, Any] = {}
    settings: Mapping[str, tuple[int, str]] = {
        "one panel": (1, "all"),
        "three panels with overlays": (3, "axial"),
        "three panels with overlays, all planes": (3, "all"),
    }
    for name, (panels, plane) in settings.items():
        viewer = example(panels)
        viewer.plane = plane
        mount(page, viewer)
        page.evaluate(TURN, 5)
        times = page.evaluate(TURN, EVENTS)
        results[name] = {"events": EVENTS, "changed": times["changed"], "promised_ms": PROMISED.get(name)}
        for kind in ("drawn", "shown"):
            results[name][f"{kind}_ms"] = round(statistics.median(times[kind]), 2)
            results[name][f"{kind}_p90_ms"] = round(float(np.quantile(times[kind], 0.9)), 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/viewer.json"))
    out = parser.parse_args().out
    with browser_page() as page:
        load, results = os.getloadavg()[0], measure(page)
        version = page.context.browser.version if page.context.browser else ""
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "browser": f"Chromium {version}, headless, without GPU",
        "load_before": round(load, 2),
    }
    found = {"voxels": [SIDE] * 3, "unit": UNIT, "machine": machine, "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)
    print(json.dumps(results, indent=1))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
