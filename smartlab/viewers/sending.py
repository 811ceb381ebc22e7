"""How a scene travels to the browser: what it must know at once, small arrays whole, voxels in blocks.

Voxels are sent in the order (Z, Y, X), so that an axial slice is one stretch of memory there, and a block
is some rows of X voxels. What is small goes as one message; of a large scan the three planes in sight go
first and the front end asks for the rest block by block, nearest first: no message is above 8 MB, and the
kernel is free between two of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from smartlab.core import plots
from smartlab.viewers import render
from smartlab.viewers.scene import Packed, Scene, window_of

BLOCK = 8_000_000  # bytes of a message before it is compressed
LITTLE = 1_000_000  # of one that nobody waits for: what is asked for meanwhile does not wait for it
Message = tuple[dict[str, Any], list[bytes]]
Part = tuple[dict[str, Any], np.ndarray]


def describe(scene: Scene, bounds: Sequence[float], title: str, name: str) -> dict[str, Any]:
    """What the front end must know before the voxels arrive; small and without any voxel."""
    presets: list[tuple[str, tuple[float, float]]] = list(plots.WINDOWS.items())
    if scene.value_name != "HU":
        low, high = window_of(None, scene)
        half = (low + high) / 2
        usual = "0.5 to 99.5 %" if scene.value_name == "MR" else "whole range"
        presets = [(usual, (low, high)), ("lower half", (low, half)), ("upper half", (half, high))]
    if all(tuple(bounds) != tuple(known) for _, known in presets):
        presets.append(("given", (bounds[0], bounds[1])))
    units = scene.grid is not None
    return {
        "name": name,
        "title": title,
        "shape": list(scene.shape),
        "spacing": list(scene.spacing),
        "affine": scene.affine.tolist(),
        "grid": list(scene.grid) if scene.grid else None,
        "unit_of": [scene.unit_of(axis).tolist() for axis in range(3)] if units else None,
        "flat": scene.flat,
        "value": scene.value_name,
        "length": scene.length,
        "notes": scene.notes,
        "bounds": list(bounds),
        "heads": scene.heads(),
        "spans": [list(scene.span(head)) for head in range(-1, scene.heads())],
        "windows": [[label, *map(float, pair)] for label, pair in presets],
        "overlays": [overlay for overlay in render.OVERLAYS if scene.has(overlay)],
        "labels": {str(v): [text, round(scene.means[v], 2)] for v, text in scene.names.items()},
        "panels": [
            {"title": x.title, "note": x.note, "hidden": None if x.mask is None else float(x.mask.mean())}
            for x in scene.layers
        ],
    }


def everything(scene: Scene) -> Message:
    """The scene in one message."""
    return _begin(scene, _whole(scene, _volumes(scene)[0]), 0)


def beginning(scene: Scene, cursor: Sequence[int], in_sight: bool = False) -> Message:
    """All of a small scene; of a large one, or if asked of any, what is in sight, and how many rows make a block."""
    volumes, _ = _volumes(scene)
    rows, total = _rows(scene), scene.shape[1] * scene.shape[2]
    if rows >= total and (scene.flat or not in_sight):
        return everything(scene)
    if scene.flat:
        return _begin(scene, [_stretch(n, v, 0, rows) for n, v in volumes.items()], rows)
    return _begin(scene, _planes(volumes, cursor), rows)


def block(scene: Scene, first: int, rows: int) -> Message:
    """The rows of a block, of the image and of all that has a value for every voxel."""
    last = min(first + rows, scene.shape[1] * scene.shape[2])
    volumes, same = _volumes(scene)
    return _message("block", scene, [_stretch(n, v, first, last) for n, v in volumes.items()], same, at=first)


def around(scene: Scene, start: Sequence[int]) -> dict[str, Any]:
    """What a viewer must know of the scan of which it shows a crop, to ask for the rest of it in its own time."""
    return {"shape": list(scene.shape), "start": list(start), "block": _rows(scene, LITTLE)}


def moved(scene: Scene, whole: Scene, start: Sequence[int], cursor: Sequence[int], fill: float) -> Message:
    """Another crop of a scan that has travelled: where it begins, what lies on its units, its reconstructions."""
    volumes, same = _volumes(scene)
    own = {name: one for name, one in volumes.items() if name.startswith("reconstruction")}
    parts, rows = _guesses(scene, own, cursor)
    for number in range(len(scene.layers)):
        parts += _units(scene, number, ("mask", "attention"))
    gone = [f"reconstruction{number}" for number in range(len(scene.layers))]
    raw = round((fill - whole.image.offset) / whole.image.scale)
    where = {"start": list(start), "cursor": list(cursor), "fill": raw}
    return _message("update", scene, parts, same, moved=where, gone=gone, block=rows)


def changed(scene: Scene, number: int, names: Sequence[str], cursor: Sequence[int]) -> Message:
    """What `Scene.change` changed of a panel; a large reconstruction begins anew with the planes in sight."""
    parts = list(_units(scene, number, names))
    gone = [f"{name}{number}" for name in names if getattr(scene.layers[number], name) is None]
    guess, rows = scene.layers[number].reconstruction, 0
    if "reconstruction" in names and guess is not None:
        own = {f"reconstruction{number}": guess}
        gone += list(own)  # what it shared with another panel stays that panel's
        voxels, rows = _guesses(scene, own, cursor)
        parts += voxels
    return _message("update", scene, parts, {}, panel=number, gone=gone, block=rows)


def _guesses(scene: Scene, own: dict[str, Packed], cursor: Sequence[int]) -> tuple[list[Part], int]:
    """Reconstructions, and 0; of large ones the planes in sight, and how many rows make a block."""
    if all(one.raw.nbytes <= BLOCK for one in own.values()):
        return _whole(scene, own), 0
    return [] if scene.flat else _planes(own, cursor), _rows(scene)


def _begin(scene: Scene, voxels: list[Part], rows: int) -> Message:
    parts = [_part(name, render.palette(name)) for name in ("heat", "viridis")]
    parts.append(_part("colours", render.label_colours()))
    for number in range(len(scene.layers)):
        parts += _units(scene, number, ("mask", "attention"))
    return _message("arrays", scene, voxels + parts, _volumes(scene)[1], block=rows)


def _message(kind: str, scene: Scene, parts: list[Part], same: dict[str, str], **more: Any) -> Message:
    arrays = [part for part, _ in parts]
    content = {"kind": kind, "shape": list(scene.shape), "arrays": arrays, "same": same, **more}
    return content, [zlib.compress(np.ascontiguousarray(array).data, 1) for _, array in parts]


def _part(name: str, array: np.ndarray, scale: float = 1.0, offset: float = 0.0, **more: Any) -> Part:
    described = {"name": name, "type": str(array.dtype), "shape": list(array.shape)}
    return {**described, "scale": scale, "offset": offset, **more}, array


def _units(scene: Scene, number: int, names: Iterable[str]) -> Iterable[Part]:
    """What lies on the grid of units: a mask as bits, attention as it is."""
    layer = scene.layers[number]
    if "mask" in names and layer.mask is not None:
        bits = np.packbits(layer.mask.ravel(), bitorder="little")
        yield _part(f"mask{number}", bits, type="bits", shape=list(layer.mask.shape))
    if "attention" in names and layer.attention is not None:
        yield _part(f"attention{number}", layer.attention)


def _volumes(scene: Scene) -> tuple[dict[str, Packed], dict[str, str]]:
    """All that has a value for every voxel, and which names stand for the same: panels often share one."""
    volumes = {"image": scene.image}
    if scene.labels is not None:
        volumes["labels"] = Packed(scene.labels)
    sent: dict[int, str] = {}
    same: dict[str, str] = {}
    for number, layer in enumerate(scene.layers):
        guess, name = layer.reconstruction, f"reconstruction{number}"
        if guess is not None and id(guess.raw) in sent:
            same[name] = sent[id(guess.raw)]
        elif guess is not None:
            sent[id(guess.raw)] = name
            volumes[name] = guess
    return volumes, same


def _rows(scene: Scene, size: int = 0) -> int:
    """Rows of X voxels in a block of so many bytes: whole axial slices where they fit."""
    x, y, z = scene.shape
    each = x * sum(v.raw.itemsize for v in _volumes(scene)[0].values())
    rows = max(1, (size or BLOCK) // each)
    return min(rows // y * y or rows, y * z)


def _whole(scene: Scene, volumes: dict[str, Packed]) -> list[Part]:
    return [_stretch(name, v, 0, scene.shape[1] * scene.shape[2]) for name, v in volumes.items()]


def _stretch(name: str, packed: Packed, first: int, last: int) -> Part:
    x, y, _ = packed.raw.shape
    low, high = first // y, -(-last // y)
    rows = np.ascontiguousarray(packed.raw[:, :, low:high].T).reshape(-1, x)[first - low * y : last - low * y]
    return _part(name, rows, packed.scale, packed.offset, first=first)


def _planes(volumes: dict[str, Packed], cursor: Sequence[int]) -> list[Part]:
    """The three planes through the cursor."""
    return [
        _part(n, np.take(v.raw, [cursor[a]], axis=a).T, v.scale, v.offset, axis=a, at=cursor[a])
        for a in (2, 1, 0)
        for n, v in volumes.items()
    ]
