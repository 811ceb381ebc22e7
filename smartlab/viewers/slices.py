"""`view`: a scan in three planes with one cursor, its masks, attention and reconstruction on top.

The widget draws in the browser. Its state holds only a few settings; the voxels travel once, as
compressed binary messages, when a front end asks for them, so that no notebook file ever holds them.
Where no kernel answers (HTML export, a reopened notebook) the static picture shown with it remains;
`save_html` writes a page that needs none.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anywidget
import numpy as np
import traitlets

from smartlab.core import plots
from smartlab.core.errors import UseError, one_of
from smartlab.core.files import write_text
from smartlab.viewers import page, render, sending
from smartlab.viewers.front import FRONT_END, Pictured, front_end
from smartlab.viewers.scene import Panel, Scene, build, window_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LOOK = ("window", "shown", "opacity", "head", "span", "hidden", "contours")  # as in `render.Look`
STATE = ("meta", "cursor", "plane", "only", "picked", *LOOK)


class Around(NamedTuple):
    """The scan of which a viewer shows a crop: from which voxel on, and what lies beyond the scan."""

    scene: Scene
    start: Sequence[int]
    fill: float


class SliceViewer(Pictured, anywidget.AnyWidget):
    """Slices with overlays: a widget, and the same state as a Matplotlib figure.

    cursor: voxel (i, j, k) that all planes go through;  plane: axial, coronal, sagittal or all.
    window: (low, high);  shown: overlays now visible;  opacity: overlay -> 0..1;  only: panels shown, [] for all.
    head:   -1 is the mean;  span: (low, high) of attention's colours as multiples of an even share, [] for the best.
    hidden: how hidden units are drawn: tint, opaque (what the student gets) or outline;  contours: of labels.
    picked: with `pick`, the voxel [i, j, k] of the last double click, which else enlarges a plane.
    """

    _esm = front_end(*FRONT_END) + "\nexport default { initialize, render: renderSlices };\n"
    _css = front_end("slices.css")

    meta = traitlets.Dict().tag(sync=True)
    cursor = traitlets.List(traitlets.Int()).tag(sync=True)
    window = traitlets.List(traitlets.Float()).tag(sync=True)
    plane = traitlets.Unicode("all").tag(sync=True)
    only = traitlets.List(traitlets.Int()).tag(sync=True)
    shown = traitlets.List(traitlets.Unicode()).tag(sync=True)
    opacity = traitlets.Dict().tag(sync=True)
    head = traitlets.Int(-1).tag(sync=True)
    span = traitlets.List(traitlets.Float()).tag(sync=True)
    hidden = traitlets.Enum(render.STYLES, "tint").tag(sync=True)
    contours = traitlets.Bool(False).tag(sync=True)
    picked = traitlets.List(traitlets.Int()).tag(sync=True)

    def __init__(
        self,
        scene: Scene,
        window: Any = None,
        plane: str = "axial",
        title: str = "",
        pick: bool = False,
        around: Around | None = None,
    ) -> None:
        one_of("no plane", plane, (*plots.PLANES, "all"))
        self.scene, self.title, self.name, self._pick = scene, title, uuid.uuid4().hex[:12], pick
        self._around = around
        self._bounds, self.alt = window_of(window, scene), title or "Slices of the image with their overlays"
        alone = len(scene.layers) == 1 and not scene.flat
        super().__init__(
            meta=self._describe(scene),
            cursor=[n // 2 for n in scene.shape],
            window=list(self._bounds),
            plane="axial" if scene.flat else "all" if alone else plane,
            shown=[name for name in ("mask", "attention", "labels") if scene.has(name)][:1],
            opacity=dict(render.OPACITY),
        )
        self._focus = plane if plane != "all" else "axial"
        self.on_msg(self._answer)

    def _describe(self, scene: Scene) -> dict[str, Any]:
        return {**sending.describe(scene, self._bounds, self.title, self.name), "pick": self._pick}

    def _answer(self, _: Any, message: Any, __: Any) -> None:
        """Send voxels to the front end that asks for them."""
        kind = message.get("kind") if isinstance(message, dict) else None
        if kind == "load":
            self._begin()
        elif kind == "block":
            self.send(*sending.block(self.scene, int(message["at"]), int(message["rows"])))
        elif kind == "round" and self._around is not None:
            content, buffers = sending.block(self._around.scene, int(message["at"]), int(message["rows"]))
            self.send({**content, "kind": "round"}, buffers)

    def _begin(self, in_sight: bool = False) -> None:
        content, buffers = sending.beginning(self.scene, self.cursor, in_sight)
        if self._around is not None:
            content["round"] = sending.around(self._around.scene, self._around.start)
        self.send(content, buffers)

    def early(self) -> None:
        """The planes in sight travel with the widget: a kernel that is at work by then need not be asked for them."""
        self._begin(in_sight=True)

    def move(self, scene: Scene, start: Sequence[int], cursor: Sequence[int]) -> None:
        """Show another crop, of the same size, of the scan that lies around: voxels that are there do not travel."""
        assert self._around is not None
        self.scene, self._around = scene, self._around._replace(start=start)
        new = self._changes()
        content, buffers = sending.moved(scene, self._around.scene, start, cursor, self._around.fill)
        self.send({**content, "meta": new}, buffers)
        self.cursor = list(cursor)

    def _changes(self) -> dict[str, Any]:
        """What is to be said of the scene that was not said before."""
        new = {name: value for name, value in self._describe(self.scene).items() if value != self.meta[name]}
        self.meta.update(new)  # in place: who comes later reads it, who is there gets the difference
        return new

    def update(
        self,
        panel: int = 0,
        *,
        mask: Any = None,
        attention: Any = None,
        reconstruction: Any = None,
        title: str = "",
        note: str = "",
    ) -> None:
        """Put other overlays into a panel that is on the screen: only they travel, all else stays as it is.

        Arguments as in `Panel`; what is not given stays, and False takes an overlay away. The static picture
        is drawn anew by `figure` and `still` only.

        >>> view(volume, mask=hidden).update(mask=~hidden, note="the other units")
        """
        names = self.scene.change(panel, Panel(title, mask, attention, reconstruction, note))
        if self.head >= self.scene.heads():
            self.head = -1
        new = self._changes()
        content, buffers = sending.changed(self.scene, panel, names, self.cursor)
        self.send({**content, "meta": new}, buffers)

    def figure(
        self, index: int | Sequence[int] | None = None, *, mm: Sequence[float] | None = None
    ) -> Figure:
        """What the widget shows now as a Matplotlib figure.

        index: slice of the plane, or voxel (i, j, k) to go through; mm: the same place in world RAS mm.
        """
        how = {name: getattr(self, name) for name in (*LOOK, "plane", "only", "title")}
        return render.picture(self.scene, self._place(index, mm), **how)

    def _place(self, index: int | Sequence[int] | None, mm: Sequence[float] | None) -> list[int]:
        place, shape = list(self.cursor), self.scene.shape
        if mm is not None:
            inverse = np.linalg.inv(self.scene.affine)
            place = np.rint(inverse[:3, :3] @ np.asarray(mm, float) + inverse[:3, 3]).astype(int).tolist()
        elif isinstance(index, (int, np.integer)):
            place[render.AXES[self._focus if self.plane == "all" else self.plane][2]] = int(index)
        elif index is not None:
            place = [int(i) for i in index]
        if len(place) != 3 or any(not 0 <= i < n for i, n in zip(place, shape, strict=True)):
            raise UseError("this place is outside the image", found=place, expected=f"voxels 0 to {shape}")
        return place

    def save_html(self, path: str | Path, *, megabytes: float = 5) -> Path:
        """Write a page that needs neither kernel nor network: the viewer with its voxels, as it is now.

        A scan that would make the page larger than this is averaged over some voxels, and the page says so.
        """
        small, message, buffers = page.fitting(self.scene, int(megabytes * 1e6))
        shrink = [n / m for n, m in zip(self.scene.shape, small.shape, strict=True)]
        place = zip(self.cursor, shrink, small.shape, strict=True)
        state = self.state() | {"cursor": [min(int(c / s), m - 1) for c, s, m in place]}
        state["meta"] = {**self._describe(small), "pick": False}
        write_text(Path(path), page.html(self.title or "Slices", state, message, buffers))
        return Path(path)

    def state(self) -> dict[str, Any]:
        """The settings that a page begins with."""
        return {name: getattr(self, name) for name in STATE}

    def __repr__(self) -> str:
        panels = f", {len(self.scene.layers)} panels" if len(self.scene.layers) > 1 else ""
        return f"SliceViewer({self.scene.shape}{panels})"


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
    pick: bool = False,
    channel: int = 0,
) -> SliceViewer:
    """Look at an image and what a method makes of it: a widget with a static picture.

    image:   a `Volume`, a `Mammogram`, an array (X, Y, Z) in HU and RAS order, or a 2D image (rows, columns).
    window:  a name of `smartlab.core.plots.WINDOWS` ("lung", "soft tissue", "bone", "liver", …; add your own), or
             (low, high); default soft tissue for HU, of MR between its percentiles, else the whole range.
    plane:   the plane that several panels show; one panel shows all three.
    labels:  a segmentation: what `read_labels` and `read_mask` give, or whole numbers of the image's shape, 0 for none;
             label_names: number -> name.
    mask, attention, reconstruction: as in `Panel`, or panels for several side by side.
    unit:    voxels of one mask unit along each axis; default: the image divided by the grid, where that is 1, 2, 4, …
    channel: which one is shown of a `Volume` of several, from 0.
    pick:    a double click sets `picked` instead of enlarging a plane.

    >>> viewer = view(volume, window="lung", mask=hidden, attention=heads)
    >>> viewer.figure(40).savefig("slice.png")
    """
    if panels is not None and any(v is not None for v in (mask, attention, reconstruction)):
        raise UseError("give panels, or one mask, attention and reconstruction, not both")
    if panels is not None and not panels:
        raise UseError("no panels", expected="at least one Panel")
    chosen = [Panel("", mask, attention, reconstruction)] if panels is None else list(panels)
    scene = build(
        image,
        chosen,
        spacing=spacing,
        affine=affine,
        labels=labels,
        label_names=label_names,
        unit=unit,
        channel=channel,
    )
    return SliceViewer(scene, window, plane, title, pick)
