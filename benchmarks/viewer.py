"""How long a slice change takes in the browser: from the event to the drawn image.

    python -m benchmarks.viewer --out benchmarks/results/viewer.json

A viewer on 128³ voxels is opened in headless Chromium, with a stand-in for the notebook's side of the
widget, and turned by 50 wheel events. For each, the time until the new pixels are on the canvas
("drawn", read back from it) and until the browser has put the next frame on the screen ("shown").
Promised, as medians of "shown": under 20 ms for one panel, under 40 ms for three with overlays.

Of scans of 512 × 512: the time from the cell to the first picture (promised: 2 s) and to the last voxel (20 s), the
largest message (8 MB), and the same times for a slice and for a window of all planes (33 ms, 95th percentile 60 ms).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
from playwright.sync_api import Page, sync_playwright

from smartlab.viewers.scene import Panel
from smartlab.viewers.slices import STATE, SliceViewer, view

PROMISED = {"one panel": 20, "three panels with overlays": 40}  # ms
SIDE, UNIT, EVENTS = 128, 16, 50
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

MOUNT = """async ({ esm, css, state, address }) => {
  const style = document.createElement("style");
  style.textContent = css;
  document.head.append(style);
  const listeners = {};
  window.tell = (event, ...what) => { for (const act of listeners[event] ?? []) act(...what); };
  window.model = {
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; },
    save_changes: () => {},
    on: (event, act) => { (listeners[event] ??= []).push(act); },
    off: () => {},
    send: async (message) => {
      const bytes = await (await fetch(address, { method: "POST", body: JSON.stringify(message) })).arrayBuffer();
      let at = 4 + new DataView(bytes).getUint32(0, true);
      const [content, sizes] = JSON.parse(new TextDecoder().decode(bytes.slice(4, at)));
      window.tell("msg:custom", content, sizes.map((size) => new DataView(bytes, (at += size) - size, size)));
    },
  };
  const module = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
  const el = document.createElement("div");
  document.body.replaceChildren(el);
  window.began = performance.now();
  module.default.initialize?.({ model: window.model });
  module.default.render({ model: window.model, el });
}"""

DELIVER = """([content, texts]) => window.tell("msg:custom", content, texts.map(
  (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer)))"""

TURN = """async ([events, kind]) => {
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
    const options = { bubbles: true, cancelable: true };
    stage.dispatchEvent(kind === "wheel" ? new WheelEvent("wheel", { deltaY: i % 20 < 10 ? 100 : -100, ...options })
      : new KeyboardEvent("keydown", { key: String(1 + (i % 3)), ...options }));
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


class Kernel(BaseHTTPRequestHandler):
    """Stands in for the notebook: answers the messages of a viewer, which it finds by its name, in binary."""

    viewers: ClassVar[dict[str, SliceViewer]] = {}
    sent: ClassVar[dict[str, list[tuple[dict[str, Any], list[bytes]]]]] = {}
    largest: ClassVar[int] = 0

    def do_POST(self) -> None:
        name = self.path[1:]
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.viewers[name]._answer(None, message, [])
        content, buffers = self.sent[name].pop()
        header = json.dumps([content, [len(b) for b in buffers]]).encode()
        body = b"".join([len(header).to_bytes(4, "little"), header, *buffers])
        Kernel.largest = max(Kernel.largest, len(body))
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@cache
def kernel() -> str:
    """The address of the stand-in, which answers as long as this process lives."""
    server = HTTPServer(("127.0.0.1", 0), Kernel)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def mount(page: Page, viewer: SliceViewer) -> None:
    """Draw the viewer on a page without a notebook."""
    sent: list[tuple[dict[str, Any], list[bytes]]] = []
    Kernel.viewers[viewer.name], Kernel.sent[viewer.name] = viewer, sent
    viewer.send = lambda content, buffers=None: sent.append((content, buffers or []))  # type: ignore[method-assign]
    page.evaluate(
        MOUNT,
        {
            "esm": str(viewer._esm),
            "css": str(viewer._css),
            "state": {name: getattr(viewer, name) for name in STATE},
            "address": f"{kernel()}/{viewer.name}",
        },
    )
    page.wait_for_selector(".smartlab-stage")


def deliver(page: Page, viewer: SliceViewer) -> int:
    """Bring to the page what the viewer has sent of itself; how many bytes."""
    size = 0
    for content, buffers in Kernel.sent[viewer.name]:
        page.evaluate(DELIVER, [content, [base64.b64encode(b).decode() for b in buffers]])
        size += len(json.dumps(content)) + sum(map(len, buffers))
    Kernel.sent[viewer.name].clear()
    return size


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


def turned(page: Page, kind: str = "wheel") -> dict[str, Any]:
    """Times in ms of 50 changes of the slice ("wheel") or of the window of all planes ("window")."""
    page.evaluate(TURN, [5, kind])
    times = page.evaluate(TURN, [EVENTS, kind])
    found = {"events": EVENTS, "changed": times["changed"]}
    for name in ("drawn", "shown"):
        found[f"{name}_ms"] = round(statistics.median(times[name]), 2)
        found[f"{name}_p95_ms"] = round(float(np.quantile(times[name], 0.95)), 2)
    return found


def measure(page: Page) -> dict[str, Any]:
    """Medians and 95th percentiles in ms over 50 slice changes."""
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
        results[name] = {**turned(page), "promised_ms": PROMISED.get(name)}
    return results


def large(shape: tuple[int, int, int]) -> np.ndarray:
    """A body in air with the noise of a CT, which compresses as one does; it repeats every 20 slices."""
    x, y, z = (np.linspace(-1, 1, n) for n in (*shape[:2], 20))
    noise = np.random.default_rng(0).normal(0, 20, (*shape[:2], 20))
    body = (x[:, None, None] / 0.9) ** 2 + (y[:, None] / 0.7) ** 2 < 1 - 0.2 * z**2
    slab = np.where(body, 40 + noise, -1000 + noise / 4).astype(np.int16)
    return np.tile(slab, (1, 1, -(-shape[2] // 20)))[:, :, : shape[2]]


def measure_large(page: Page, depth: int, overlays: bool = False) -> dict[str, Any]:
    """A scan of 512 × 512: seconds to the first picture and to the last block, the largest message, times of a change."""
    image, given = large((512, 512, depth)), {}
    if overlays:
        heads = np.random.default_rng(0).random((4, 32, 32, depth // 16))
        given = {"mask": heads[0] > 0.5, "attention": heads / heads.sum((1, 2, 3), keepdims=True)}
        given["labels"] = (image > -200).astype(np.uint8)
    began = time.perf_counter()
    viewer = view(image, **given)
    viewer.shown = list(given)
    viewer.still()
    cell = time.perf_counter() - began
    Kernel.largest = 0
    mount(page, viewer)
    first = page.evaluate("(performance.now() - window.began) / 1000")
    page.wait_for_function("document.querySelector('.smartlab-viewer').dataset.loaded === '1'")
    whole = page.evaluate("(performance.now() - window.began) / 1000")
    found = {"cell_s": cell, "first_picture_s": cell + first, "whole_s": cell + whole}
    found = {name: round(value, 2) for name, value in found.items()}
    return {
        **found,
        "largest_message_mb": round(Kernel.largest / 1e6, 2),
        "slice": turned(page),
        "window": turned(page, "window"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/viewer.json"))
    out = parser.parse_args().out
    with browser_page() as page:
        load, results = os.getloadavg()[0], measure(page)
        results["512 × 512 × 304"] = measure_large(page, 304)
        results["512 × 512 × 304, with overlays"] = measure_large(page, 304, overlays=True)
        results["512 × 512 × 600"] = measure_large(page, 600)
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
