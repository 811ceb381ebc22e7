"""How long it takes from a control of the mask explorer to the picture, in JupyterLab with its kernel.

    python -m benchmarks.explorer --out benchmarks/results/explorer.json

A phantom is explored in headless Chromium, and a control turned 50 times by a key. For each: the time from the
key to the first frame that shows other pixels, and the bytes that came over the websocket. Beside it the
kernel's part alone, without a browser. Promised, at the median: under 100 ms in all, under 30 ms in the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from playwright.sync_api import Page, sync_playwright

from benchmarks.viewer import ARGUMENTS, _processor
from smartlab.viewers.explore import Explorer
from tests.browser import example
from tests.browser.conftest import chromium
from tests.browser.server import jupyterlab, run_notebook, write_notebook

PROMISED = {"picture": 100, "kernel": 30}  # ms, medians
EVENTS = 50

WATCH = """async ([selector, key]) => {
  const canvases = [...document.querySelectorAll(".smartlab-stage .smartlab-pixels")];
  const look = () => canvases.map((one) => one.getContext("2d").getImageData(0, 0, one.width, one.height).data.reduce((a, b) => (a * 31 + b) | 0, 7)).join();
  const frame = () => new Promise((done) => requestAnimationFrame(() => {
    const channel = new MessageChannel(); // its message arrives after the frame has been painted
    channel.port1.onmessage = done;
    channel.port2.postMessage(0);
  }));
  const handle = document.querySelector(selector);
  const before = look();
  await frame();
  const start = performance.now();
  handle.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  while (look() === before && performance.now() - start < 5000) await frame();
  return performance.now() - start;
}"""
MARK = """(text) => {
  for (const label of document.querySelectorAll(".widget-label")) {
    if (label.textContent === text) label.closest(".widget-inline-hbox").querySelector(".noUi-handle")?.setAttribute("data-bench", text);
  }
}"""


def kernel_part(explorer: Explorer) -> dict[str, list[float]]:
    """ms of the kernel, on one thread, for a ratio, a seed, a strategy, and a look that nobody had before."""
    torch.set_num_threads(1)  # as in the JupyterLab beside
    ratios = np.linspace(0.3, 0.8, EVENTS).round(2)
    names = ["random", "block", "attention_high", "attention_low", "attention_sample"]
    turns: dict[str, Any] = {
        "ratio": [{"ratio": float(r)} for r in ratios],
        "seed": [{"seed": i, "strategy": "random"} for i in range(1, EVENTS + 1)],
        "strategy": [{"strategy": names[i % len(names)]} for i in range(EVENTS)],
        "draw of noise": [
            {"strategy": "attention_high", "guide": "noisy", "draw": i} for i in range(1, EVENTS + 1)
        ],
    }
    found: dict[str, list[float]] = {}
    for name, changes in turns.items():
        explorer.set(**changes[-1])
        found[name] = []
        for change in changes:
            began = time.perf_counter()
            explorer.set(**change)
            found[name].append(1000 * (time.perf_counter() - began))
    return found


def browser_part(page: Page, received: list[int]) -> dict[str, dict[str, Any]]:
    """ms and bytes for a ratio, a seed and a draw of noise, by the keyboard."""
    found = {}
    for name, text in (("ratio", "ratio"), ("seed", "seed"), ("draw of noise", "draw")):
        if name == "seed":
            page.locator(".widget-dropdown", has=page.get_by_text("strategy", exact=True)).locator(
                "select"
            ).select_option("random")
        if name == "draw of noise":
            for label, value in (("strategy", "attention high"), ("teacher", "noisy")):
                page.locator(".widget-dropdown", has=page.get_by_text(label, exact=True)).locator(
                    "select"
                ).select_option(value)
        page.wait_for_timeout(1500)
        page.evaluate(MARK, text)
        times, sizes = [], []
        for i in range(EVENTS + 3):
            received.clear()  # a step of five in the ratio changes every slice
            key = {"ratio": "Page", "seed": "Arrow"}.get(name, "Arrow")
            key += (
                ("Up" if i % 10 < 5 else "Down")
                if name == "ratio"
                else "Right"
                if name == "seed" or i % 40 < 20
                else "Left"
            )
            took = page.evaluate(WATCH, [f'[data-bench="{text}"]', key])
            page.wait_for_timeout(100)
            if i >= 3:  # the first ones warm up
                times.append(took)
                sizes.append(sum(received))
        found[name] = {**summary(times), "bytes": int(statistics.median(sizes))}
    return found


def summary(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(times), 1),
        "p95_ms": round(float(np.quantile(times, 0.95)), 1),
        "events": len(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/explorer.json"))
    out = parser.parse_args().out
    received: list[int] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, sync_playwright() as play:
        folder = Path(name)
        example.prepare(folder)
        write_notebook(folder, "explorer", example.NOTEBOOKS["explorer"])
        kernel = {name: summary(times) for name, times in kernel_part(example.explorer(folder)).items()}
        browser = play.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        with jupyterlab(folder) as lab:
            context = browser.new_context(viewport={"width": 1400, "height": 900})
            context.set_default_timeout(120_000)
            context.on(
                "page",
                lambda page: page.on(
                    "websocket", lambda ws: ws.on("framereceived", lambda frame: received.append(len(frame)))
                ),
            )
            page, _ = run_notebook(context, lab, "explorer")
            page.wait_for_selector(".smartlab-stage")
            page.wait_for_timeout(2000)
            picture = browser_part(page, received)
            version = browser.version
        browser.close()
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "browser": f"Chromium {version}, headless, without GPU",
        "load_before": round(load, 2),
    }
    results = {"promised_ms": PROMISED, "kernel": kernel, "picture": picture, "machine": machine}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
