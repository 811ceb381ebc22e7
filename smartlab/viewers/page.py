"""A viewer as one file: the same front end with its voxels in it, which asks neither a kernel nor the network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np

from smartlab.viewers import sending
from smartlab.viewers.front import FRONT_END, front_end
from smartlab.viewers.scene import Layer, Packed, Scene

FEW = 8_000_000  # voxels of a page at most, whatever they compress to
START = "renderSlices({ model: new Page(pageData()), el: document.querySelector('main') });"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>body {{ margin: 16px; }}
{css}</style>
</head>
<body>
<main></main>
<script type="application/json" id="smartlab-data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def html(
    title: str,
    state: dict[str, Any],
    message: dict[str, Any],
    buffers: Sequence[bytes],
    *,
    scripts: Sequence[str] = (),
    start: str = START,
    **more: Any,
) -> str:
    """The page as text.

    scripts: further files of `static/`;  start: what the page does once it is there;  more: JSON, beside
    `state`, `message` and `buffers` in what `pageData()` gives.
    """
    data = {
        "state": state,
        "message": message,
        "buffers": [base64.b64encode(b).decode() for b in buffers],
        **more,
    }
    script = front_end(*FRONT_END, "page.js", *scripts) + "\n" + start
    text = json.dumps(data).replace("</", "<\\/")
    return _PAGE.format(title=escape(title), css=front_end("slices.css"), data=text, script=script)


def fitting(scene: Scene, limit: int) -> tuple[Scene, dict[str, Any], list[bytes]]:
    """The scene, or the finest average of it, whose message fits into `limit` bytes of a page."""
    steps = [1, 1, 1]
    while True:
        shape = [n // s for n, s in zip(scene.shape, steps, strict=True)]
        if np.prod(shape) <= FEW:
            small = averaged(scene, steps) if max(steps) > 1 else scene
            message, buffers = sending.everything(small)
            if sum(map(len, buffers)) * 4 / 3 < limit or np.prod(shape) < 1000:
                return small, message, buffers
        lengths = [s * n if m > 1 else np.inf for s, n, m in zip(scene.spacing, steps, shape, strict=True)]
        steps[int(np.argmin(lengths))] += 1


def averaged(scene: Scene, steps: Sequence[int]) -> Scene:
    """The scene with the mean of some voxels in the place of each, to a thousandth of the range of values.

    What does not fill a step at the end is left out.
    """
    a, b, c = steps
    shape = [n // s for n, s in zip(scene.shape, steps, strict=True)]
    low, high = scene.image.span

    def mean(packed: Packed) -> Packed:
        unit = max(1, round((high - low) / packed.scale / 1000))  # coarser numbers are shorter in a file
        new = np.empty(shape, np.float32)
        for k in range(shape[2]):  # slice by slice: a large scan is not copied as fractions
            slab = packed.raw[: shape[0] * a, : shape[1] * b, k * c : (k + 1) * c]
            new[:, :, k] = slab.reshape(shape[0], a, shape[1], b, c).mean((1, 3, 4), dtype=np.float32)
        rounded = np.clip(np.rint(new / unit) * unit, -32768, 32767)
        return Packed(rounded.astype(np.int16), packed.scale, packed.offset)

    def layer(old: Layer) -> Layer:
        return old if old.reconstruction is None else replace(old, reconstruction=mean(old.reconstruction))

    affine = scene.affine @ np.diag([*steps, 1.0])
    affine[:3, 3] = (scene.affine @ [*((s - 1) / 2 for s in steps), 1])[:3]
    sizes = " × ".join(map(str, steps[:2] if scene.flat else steps))
    labels = scene.labels
    return replace(
        scene,
        image=mean(scene.image),
        spacing=tuple(s * n for s, n in zip(scene.spacing, steps, strict=True)),  # type: ignore[arg-type]
        affine=affine,
        layers=[layer(one) for one in scene.layers],
        labels=None
        if labels is None
        else labels[a // 2 :: a, b // 2 :: b, c // 2 :: c][tuple(map(slice, shape))],
        unit=None if scene.unit is None else tuple(u / s for u, s in zip(scene.unit, steps, strict=True)),  # type: ignore[arg-type]
        notes=[
            *scene.notes,
            f"each voxel is the mean of {sizes} of the scan, rounded, which keeps this page small",
        ],
    )
