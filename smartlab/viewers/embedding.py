"""Points of an embedding linked to what they stand for: click a point, see its crop."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets

from smartlab.core import plots
from smartlab.core.errors import UseError
from smartlab.viewers import render
from smartlab.viewers.front import FRONT_END, Pictured, front_end
from smartlab.viewers.scene import Panel, Scene, as_array, build, window_of
from smartlab.viewers.sending import describe, everything

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Crops = Sequence[Any] | np.ndarray | Callable[[int], Any]
# with eight colours told apart without colour, too: in the browser, and in Matplotlib
MARKS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D"}


class EmbeddingViewer(Pictured, anywidget.AnyWidget):
    """A scatter of points beside the slices of the chosen point's crop; `chosen` is the point's number."""

    _esm = front_end(*FRONT_END, "embedding.js") + "\nexport default { render: renderEmbedding };\n"
    _css = front_end("slices.css")

    meta = traitlets.Dict().tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)
    window = traitlets.List(traitlets.Float()).tag(sync=True)

    def __init__(
        self, points: np.ndarray, labels: list[str], crops: Crops, names: list[str], window: Any, title: str
    ) -> None:
        self.points, self.labels, self.names, self.title = points, labels, names, title
        self._crops, self._window, self.name = crops, window, uuid.uuid4().hex[:12]
        self.alt = f"Scatter of {len(points)} points"
        self.kinds = sorted(set(labels))
        self._which = np.array([self.kinds.index(label) for label in labels], np.uint16)
        places = range(len(self.kinds))
        self._marks = [[*MARKS][i // 8 % len(MARKS)] for i in places]
        self._colours = [plots.OKABE_ITO[i % 8] for i in places]
        super().__init__(
            meta={
                "name": self.name,
                "title": title,
                "count": len(points),
                "kinds": self.kinds,
                "marks": self._marks,
                "colours": self._colours,
            },
        )
        self.on_msg(self._answer)

    def scene(self, number: int) -> Scene:
        """The crop of a point, checked."""
        crop = self._crops(number) if callable(self._crops) else self._crops[number]
        return build(crop, [Panel()])

    def _answer(self, _: Any, message: Any, __: Any) -> None:
        """Send the points, or the crop of one point, to the front end that asks."""
        kind = message.get("kind") if isinstance(message, dict) else None
        if kind == "points":
            buffers = [self.points.astype(np.float32).tobytes(), self._which.tobytes()]
            text = "\n".join(name.replace("\n", " ") for name in self.names).encode()
            self.send({"kind": "points"}, [zlib.compress(b, 1) for b in (*buffers, text)])
        elif kind == "crop":
            number = int(message["point"])
            try:
                scene = self.scene(number)
            except Exception as error:  # the reader of the picture must know, whatever the crops are
                self.send({"kind": "trouble", "point": number, "text": str(error)})
                return
            content, buffers = everything(scene)
            meta = describe(scene, window_of(self._window, scene), self.names[number], self.name)
            self.send({**content, "kind": "crop", "point": number, "meta": meta}, buffers)

    def figure(self, point: int | None = None) -> Figure:
        """The scatter, beside the middle slices of one crop per label or of the chosen point's crop."""
        import matplotlib.pyplot as plt

        point = self.chosen if point is None else point
        some = [point] if point >= 0 else [self.labels.index(kind) for kind in self.kinds[:8]]
        figure = plt.figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])  # type: ignore[misc]
        ax = left.subplots()
        for number, (kind, mark, colour) in enumerate(
            zip(self.kinds, self._marks, self._colours, strict=True)
        ):
            mine = self.points[self._which == number]
            ax.scatter(*mine.T, s=14, marker=MARKS[mark], color=colour, label=kind)
        ax.scatter(*self.points[some].T, s=70, facecolors="none", edgecolors="black", linewidths=1.2)
        ax.set(xticks=[], yticks=[])
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=7, ncols=1 + len(self.kinds) // 9, loc="best")
        if self.title:
            ax.set_title(self.title, fontsize=11)
        self._draw_crops(right, some)
        plt.close(figure)
        return figure

    def _draw_crops(self, part: Any, some: list[int]) -> None:
        scenes = [self.scene(number) for number in some]
        cells: list[tuple[int, plots.Plane]]
        if len(some) == 1 and not scenes[0].flat:
            cells = [(0, plane) for plane in plots.PLANES]
        else:
            cells = [(i, "axial") for i in range(len(some))]
        columns = min(4, len(cells)) if len(some) > 1 else len(cells)
        axes = part.subplots(-(-len(cells) // columns), columns, squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for ax, (i, plane) in zip(axes.flat, cells, strict=False):
            scene = scenes[i]
            middle = scene.shape[render.AXES[plane][2]] // 2
            window = window_of(self._window, scene)
            pixels = render.paint(scene, scene.layers[0], plane, middle, window=window)
            ax.imshow(pixels, aspect=plots.pixel_aspect(scene.spacing, plane))
            title = self.labels[some[i]] if len(some) > 1 else plane
            ax.set_title(title, fontsize=9)

    def __repr__(self) -> str:
        return f"EmbeddingViewer({len(self.points)} points, {len(self.kinds)} labels)"


def embedding(
    points: Any,
    labels: Sequence[Any],
    crops: Crops,
    *,
    names: Sequence[str] | None = None,
    window: str | Sequence[float] | None = None,
    title: str = "",
) -> EmbeddingViewer:
    """Link the points of an embedding to their crops.

    points: (N, 2), e.g. UMAP coordinates;  labels: N, the colour of a point;  names: N, shown beside it.
    crops:  N images as `view` takes them (volumes, arrays, 2D images), or a function point -> image,
            called only for points that are looked at.

    >>> embedding(umap, organs, lambda i: store.read(cases[i]))
    """
    array = as_array(points).astype(float)
    if array.ndim != 2 or array.shape[1] != 2 or not len(array) or not np.isfinite(array).all():
        raise UseError("points are not places in a plane", found=array.shape, expected="(N, 2), finite")
    for what, given in (("labels", labels), ("names", names), ("crops", None if callable(crops) else crops)):
        if given is not None and len(given) != len(array):
            raise UseError(f"{what} and points differ in number", found=len(given), expected=len(array))
    words = [str(label) for label in labels]
    called = [f"point {i}" for i in range(len(array))] if names is None else [str(n) for n in names]
    return EmbeddingViewer(array, words, crops, called, window, title)
