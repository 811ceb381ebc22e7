"""`view`: a scan in three planes with one cursor, its masks, attention and reconstruction on top.

The widget draws in the browser. Its state holds only a few settings; the voxels travel once, as
compressed binary messages, when a front end asks for them, so that no notebook file ever holds them.
Where no kernel answers (HTML export, a reopened notebook) the static picture shown with it remains.
"""

from __future__ import annotations

import base64
import io
import uuid
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets

from smartlab.errors import UseError
from smartlab.viewers import plots, render
from smartlab.viewers.scene import Panel, Scene, build, window_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Panel", "SliceViewer", "view"]


@cache
def front_end(*names: str) -> str:
    """The files of `static/` as one text."""
    folder = Path(__file__).parent / "static"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


class SliceViewer(anywidget.AnyWidget):
    """Slices with overlays: a widget, and the same state as a Matplotlib figure.

    cursor: voxel (i, j, k) that all planes go through;  plane: axial, coronal, sagittal or all.
    window: (low, high);  shown: overlays now visible;  opacity: overlay -> 0..1;  head: -1 is the mean.
    """

    _esm = front_end("draw.js", "slices.js") + "\nexport default { render: renderSlices };\n"
    _css = front_end("slices.css")

    meta = traitlets.Dict().tag(sync=True)
    cursor = traitlets.List(traitlets.Int()).tag(sync=True)
    window = traitlets.List(traitlets.Float()).tag(sync=True)
    plane = traitlets.Unicode("all").tag(sync=True)
    shown = traitlets.List(traitlets.Unicode()).tag(sync=True)
    opacity = traitlets.Dict().tag(sync=True)
    head = traitlets.Int(-1).tag(sync=True)

    def __init__(self, scene: Scene, window: Any = None, plane: str = "axial", title: str = "") -> None:
        if plane not in (*plots.PLANES, "all"):
            raise UseError(f"no plane {plane!r}", expected=", ".join((*plots.PLANES, "all")))
        self.scene, self.title, self.name = scene, title, uuid.uuid4().hex[:12]
        bounds = window_of(window, scene)
        alone = len(scene.layers) == 1 and not scene.flat
        super().__init__(
            meta=describe(scene, bounds, title, self.name),
            cursor=[n // 2 for n in scene.shape],
            window=list(bounds),
            plane="axial" if scene.flat else "all" if alone else plane,
            shown=[name for name in ("mask", "attention", "labels") if scene.has(name)][:1],
            opacity=dict(render.OPACITY),
        )
        self._focus = plane if plane != "all" else "axial"
        self.on_msg(self._answer)

    def _answer(self, _: Any, message: Any, __: Any) -> None:
        """Send the voxels to the front end that asks for them."""
        if isinstance(message, dict) and message.get("kind") == "load":
            self.send(*packed(self.scene))

    def figure(
        self, index: int | Sequence[int] | None = None, *, mm: Sequence[float] | None = None
    ) -> Figure:
        """What the widget shows now as a Matplotlib figure.

        index: slice of the plane, or voxel (i, j, k) to go through; mm: the same place in world RAS mm.
        """
        return render.picture(
            self.scene,
            self._place(index, mm),
            plane=self.plane,  # type: ignore[arg-type]
            title=self.title,
            window=self.window,
            shown=self.shown,
            opacity=self.opacity,
            head=self.head,
        )

    def _place(self, index: int | Sequence[int] | None, mm: Sequence[float] | None) -> list[int]:
        place, shape = list(self.cursor), self.scene.shape
        if mm is not None:
            inverse = np.linalg.inv(self.scene.affine)
            place = np.rint(inverse[:3, :3] @ np.asarray(mm, float) + inverse[:3, 3]).astype(int).tolist()
        elif isinstance(index, (int, np.integer)):
            plane = self._focus if self.plane == "all" else self.plane
            place[render.AXES[plane][2]] = int(index) // self.scene.step
        elif index is not None:
            place = [int(i) // self.scene.step for i in index]
        if len(place) != 3 or any(not 0 <= i < n for i, n in zip(place, shape, strict=True)):
            raise UseError("this place is outside the image", found=place, expected=f"voxels 0 to {shape}")
        return place

    def save_png(self, path: str | Path) -> Path:
        """Write the figure as PNG, whole or not at all."""
        return plots.save(self.figure(), path)

    def still(self) -> str:
        """The figure as an HTML image, which the widget hides once it is drawn itself."""
        data = io.BytesIO()
        self.figure().savefig(data, format="png", dpi=80, facecolor="white")
        text = base64.b64encode(data.getvalue()).decode()
        name = self.title or "Slices of the image with their overlays"
        return (
            f'<img class="smartlab-still smartlab-still-{self.name}" alt="{_escape(name)}" '
            f'style="max-width:100%" src="data:image/png;base64,{text}">'
        )

    def _ipython_display_(self, **_: Any) -> None:
        from IPython.display import display

        display({"text/html": self.still(), "text/plain": repr(self)}, raw=True)
        bundle = super()._repr_mimebundle_()
        if bundle is not None:
            data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
            display(data, metadata=metadata, raw=True)

    def __repr__(self) -> str:
        panels = f", {len(self.scene.layers)} panels" if len(self.scene.layers) > 1 else ""
        return f"SliceViewer({self.scene.shape}{panels})"


def _escape(text: str) -> str:
    from html import escape

    return escape(text, quote=True)


def describe(scene: Scene, bounds: tuple[float, float], title: str, name: str) -> dict[str, Any]:
    """What the front end must know before the voxels arrive; small and without any voxel."""
    presets: list[tuple[str, tuple[float, float]]] = list(plots.WINDOWS.items())
    if scene.value_name != "HU":
        whole = window_of(None, scene)
        presets = [
            ("whole range", whole),
            ("lower half", (whole[0], sum(whole) / 2)),
            ("upper half", (sum(whole) / 2, whole[1])),
        ]
    if all(tuple(bounds) != tuple(known) for _, known in presets):
        presets.append(("given", bounds))
    units = scene.grid is not None
    return {
        "name": name,
        "title": title,
        "shape": list(scene.shape),
        "spacing": list(scene.spacing),
        "affine": scene.affine.tolist(),
        "grid": list(scene.grid) if units else None,  # type: ignore[arg-type]
        "unit_of": [scene.unit_of(axis).tolist() for axis in range(3)] if units else None,
        "flat": scene.flat,
        "value": scene.value_name,
        "step": scene.step,
        "notes": scene.notes,
        "bounds": list(bounds),
        "heads": scene.heads(),
        "windows": [[label, *map(float, pair)] for label, pair in presets],
        "overlays": [overlay for overlay in render.OVERLAYS if scene.has(overlay)],
        "labels": {str(v): text for v, text in scene.names.items()},
        "panels": [
            {"title": x.title, "hidden": None if x.mask is None else float(x.mask.mean())}
            for x in scene.layers
        ],
    }


def packed(scene: Scene) -> tuple[dict[str, Any], list[bytes]]:
    """The voxels as one message: a description of each array, and the arrays compressed."""
    parts: list[tuple[str, np.ndarray, float, float]] = [
        ("image", scene.image.raw, scene.image.scale, scene.image.offset),
        ("cividis", render.palette("cividis"), 1, 0),
        ("magma", render.palette("magma"), 1, 0),
        ("colours", render.label_colours(), 1, 0),
    ]
    if scene.labels is not None:
        parts.append(("labels", scene.labels, 1, 0))
    sent: dict[int, str] = {}  # panels often share one attention
    same: dict[str, str] = {}
    for number, layer in enumerate(scene.layers):
        guess = layer.reconstruction
        if layer.mask is not None:
            parts.append((f"mask{number}", layer.mask.astype(np.uint8), 1, 0))
        if layer.attention is not None:
            parts.append((f"attention{number}", layer.attention, 1, 0))
        if guess is not None:
            if id(guess.raw) in sent:
                same[f"reconstruction{number}"] = sent[id(guess.raw)]
                continue
            sent[id(guess.raw)] = f"reconstruction{number}"
            parts.append((f"reconstruction{number}", guess.raw, guess.scale, guess.offset))
    described = [
        {"name": name, "type": str(array.dtype), "shape": list(array.shape), "scale": scale, "offset": offset}
        for name, array, scale, offset in parts
    ]
    buffers = [zlib.compress(np.ascontiguousarray(array).tobytes(), 1) for _, array, _, _ in parts]
    return {"kind": "arrays", "arrays": described, "same": same}, buffers


def view(
    image: Any,
    *,
    spacing: Sequence[float] | None = None,
    affine: Any = None,
    window: str | Sequence[float] | None = None,
    plane: str = "axial",
    labels: Any = None,
    label_names: Mapping[int, str] | Sequence[str] | None = None,
    mask: Any = None,
    attention: Any = None,
    reconstruction: Any = None,
    unit: float | Sequence[float] | None = None,
    panels: Sequence[Panel] | None = None,
    title: str = "",
) -> SliceViewer:
    """Look at an image and what a method makes of it: a widget with a static picture.

    image:   a `Volume`, a `Mammogram`, an array (X, Y, Z) in HU and RAS order, or a 2D image (rows, columns).
    window:  "lung", "soft tissue", "bone" or (low, high); default soft tissue for HU, else the whole range.
    plane:   the plane that several panels show; one panel shows all three.
    labels:  a segmentation: what `read_labels` and `read_mask` give, or whole numbers of the image's shape, 0 for none;
             label_names: number -> name.
    mask, attention, reconstruction: as in `Panel`, or panels for several side by side.
    unit:    voxels of one mask unit along each axis; default: the image divided by the grid, where that is 1, 2, 4, …

    >>> viewer = view(volume, window="lung", mask=hidden, attention=heads)
    >>> viewer.figure(40).savefig("slice.png")
    """
    if panels is not None and any(v is not None for v in (mask, attention, reconstruction)):
        raise UseError("give panels, or one mask, attention and reconstruction, not both")
    if panels is not None and not panels:
        raise UseError("no panels", expected="at least one Panel")
    chosen = [Panel("", mask, attention, reconstruction)] if panels is None else list(panels)
    scene = build(
        image, chosen, spacing=spacing, affine=affine, labels=labels, label_names=label_names, unit=unit
    )
    return SliceViewer(scene, window, plane, title)
