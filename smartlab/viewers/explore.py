"""`explore`: turn the knobs of masking on a scan of one's own and see at once what is hidden.

The model looks at a view once per crop and draw of noise; what a control changes after that is one call of
`smartlab.masking.make_mask` and a message of a few hundred bytes to the viewer, which holds the voxels.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np
from torch import Tensor

from smartlab.core.errors import UseError
from smartlab.core.files import write_text
from smartlab.data.images.grid import AIR
from smartlab.data.images.readers import Volume
from smartlab.masking import hidden_count, hidden_share
from smartlab.viewers import saved
from smartlab.viewers.controls import SHOWN, Choice, Controls, CopyButton
from smartlab.viewers.front import Pictured
from smartlab.viewers.looking import Looking
from smartlab.viewers.scene import Panel, Scene, build
from smartlab.viewers.slices import Around, SliceViewer, view
from smartlab.viewers.subject import Model, Subject, subject_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEN_AT_LEAST = 64  # voxels a side: less shows no anatomy


class Explorer(Looking, Pictured):
    """Controls, a viewer and numbers, in a notebook; the same by code, and as a picture.

    choice:    what the controls say; `set` moves them.       settings: the same as words for `smartlab pretrain`.
    mask:      (d, h, w) bool of the first strategy.          attention: (heads, d, h, w) of the look that guides.
    numbers:   what is hidden of body, organs and lesion, against chance, and how informative attention is.
    """

    def __init__(
        self, subject: Subject, model: Model, side: int, choice: Choice, title: str, look: Mapping[str, Any]
    ) -> None:
        super().__init__(subject, model, side)
        self.title = title
        self._table, self._copy = widgets.HTML(), CopyButton()
        self.controls = Controls(model, choice, self._table)
        self._masks = self._draw()
        self.viewer = self._new_viewer(look)
        self._map: SliceViewer | None = None
        self._where = widgets.Accordion([widgets.VBox()], titles=("Where in the scan",), selected_index=None)
        self._where.observe(lambda _: self._locate(), "selected_index")
        right = widgets.VBox(
            [self.viewer, self._copy, self._where], layout={"flex": "1 1 auto", "min_width": "0"}
        )
        self.box = widgets.HBox([self.controls, right], layout={"width": "100%"})
        self.box.add_class("smartlab-explorer")
        self.controls.observe(self._follow, "choice")
        self._show()
        self._tell()

    # ---- what there is to see ----

    @property
    def choice(self) -> Choice:
        return self.controls.choice

    def set(self, **changes: Any) -> Explorer:
        """Move controls: `explorer.set(ratio=0.5, strategy="block")`."""
        choice = Choice.of(self.model, {**vars(self.choice), **changes})
        self.controls.choice = choice
        return self

    def move(self, center: Sequence[int]) -> Explorer:
        """Look at the crop around another voxel of `subject.array`."""
        self.center = np.clip(np.asarray(center, int), 0, np.array(self.subject.array.shape) - 1)
        self._masks = self._rebuilt = self._draw()
        start, scene = self._begins, self._scene()
        inside = self._standing(self.center) - start
        self.viewer.move(scene, start.tolist(), np.clip(inside, 0, np.array(scene.shape) - 1).tolist())
        self._tell()
        self._locate()
        return self

    def _draw(self) -> dict[str, Tensor]:
        c = self.choice
        return {name: self.hide(replace(c, strategy=name)) for name in (c.strategy, c.against) if name}

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Strategy -> (d, h, w) bool, or (h, w) of a mammogram."""
        return {name: self.on_grid(mask) for name, mask in self._masks.items()}

    @property
    def mask(self) -> np.ndarray:
        return self.masks[self.choice.strategy]

    @property
    def attention(self) -> np.ndarray | None:
        """(heads, d, h, w), whose mean sums to 1; of received attention the same for every head."""
        return self.seen(self.choice)

    @property
    def numbers(self) -> dict[str, Any]:
        """chance, hidden (strategy -> region -> share), and where there is attention informativeness,
        head_diversity (cosine), head_divergence (Jensen–Shannon); of two strategies overlap and overlap_chance."""
        masks, view = self._masks, self.view
        n = next(iter(masks.values())).shape[1]
        found: dict[str, Any] = {"chance": hidden_count(self.choice.ratio, n) / n}
        found["hidden"] = {
            name: {region: float(hidden_share(mask.float(), share)) for region, share in view.shares.items()}
            for name, mask in masks.items()
        }
        found |= self.told(self.choice)
        if len(masks) == 2:
            first, second = masks.values()
            found["overlap"] = float((first & second).sum() / first.sum().clamp_min(1))
            found["overlap_chance"] = float(second.float().mean())
        return found

    @property
    def settings(self) -> list[str]:
        """The choice as words: `smartlab pretrain tiny $(…)`. A `UseError` says what no training can be told."""
        return self.choice.words(self.model)

    # ---- what follows a control ----

    def _follow(self, change: Any) -> None:
        """Draw anew, and tell the viewer what is different."""
        before, now = change["old"], change["new"]
        if replace(before, shown=now.shown) != now:
            self._masks = self._draw()
            looks = ("guide", "dropout", "draw", "importance")
            fresh = any(getattr(before, name) != getattr(now, name) for name in looks)
            attention = self.attention if fresh else None
            shown = list(self.masks.items())
            for number in range(2 if fresh else len(shown)):
                name, mask = shown[min(number, len(shown) - 1)]
                self.viewer.update(number, mask=mask, attention=attention, title=name.replace("_", " "))
        if (before.importance, before.shown, before.against) != (now.importance, now.shown, now.against):
            self._show()
        self._tell()
        self._rebuild()

    def _new_viewer(self, look: Mapping[str, Any]) -> SliceViewer:
        """The crop, in two panels, the second of which stands there only if there is a second strategy."""
        subject, config, flat = self.subject, self.model.config, self.model.flat
        bounds = np.rint(config.data.window).astype(subject.array.dtype)
        whole = self._built(np.clip(subject.array, *bounds), subject.labels, subject.affine, [Panel()])
        around = Around(whole, self._begins.tolist(), float(np.clip(0 if flat else AIR, *bounds)))
        look = {"window": config.data.window, "title": self.title, **look}
        viewer = SliceViewer(self._scene(), **look, pick=True, around=around)
        if viewer.scene.has("labels"):  # drawn round, so that the mask is seen over them
            viewer.contours, viewer.opacity, viewer.shown = (
                True,
                {**viewer.opacity, "labels": 0.0},
                ["labels"],
            )
        viewer.observe(self._picked, "picked")
        viewer.observe(lambda _: self._rebuild(), "shown")
        self._rebuilt = self._masks
        return viewer

    def _scene(self) -> Scene:
        """What is hidden of the crop now, by each strategy."""
        names, attention = list(self._masks), self.attention
        panels = [
            Panel(
                name.replace("_", " "),
                self.masks[name],
                attention,
                self._guess(name) if number < len(names) else None,
                self.subject.shown,
            )
            for number, name in enumerate((names * 2)[:2])
        ]
        return self._built(self.view.image, self.view.labels, self.view.affine, panels)

    def _built(self, image: np.ndarray, labels: Any, affine: np.ndarray, panels: list[Panel]) -> Scene:
        where: dict[str, Any] = {}
        scan: Any = Volume(image, affine, self.subject.modality)
        if self.model.flat:
            where = {"spacing": (self.model.config.data.spacing,) * 2}
            # the whole scan is one voxel thick, a crop has no such axis
            scan = image.reshape(image.shape[:2])
            labels = None if labels is None else labels.reshape(scan.shape)
        names, unit = self.subject.names, self.model.stride
        return build(scan, panels, labels=labels, label_names=names, unit=unit, **where)

    def _show(self) -> None:
        """Which panels and overlays are on, and how the mask is drawn; labels stay as they are."""
        (overlays, style), viewer = SHOWN[self.choice.shown], self.viewer
        only = [0] if len(self._masks) == 1 else []
        if viewer.only != only:
            viewer.only = only
            if not self.model.flat:
                viewer.plane = "all" if only else viewer._focus
        viewer.hidden = style
        viewer.shown = [*overlays, *(["labels"] if "labels" in viewer.shown else [])]
        looks = self.choice.importance
        viewer.head = int(looks[5:]) - 1 if looks.startswith("head") else -1

    def _picked(self, change: Any) -> None:
        """A voxel was clicked twice, in the view or in the whole scan: look at the crop around it."""
        if not (voxel := change["new"]):
            return
        whole = change["owner"] is self._map
        place = np.array(voxel) if whole else self._begins + voxel
        self.move(self._turned(place, self.subject.array.shape).tolist())

    def _standing(self, voxel: np.ndarray) -> np.ndarray:
        """A voxel of the subject as the viewer has it."""
        return self._turned(voxel, self.subject.array.shape[1::-1])

    def _turned(self, voxel: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """A voxel in the other one's order, of this shape: images stand up, their columns and rows run backwards."""
        return np.array([shape[0] - 1 - voxel[1], shape[1] - 1 - voxel[0], 0]) if self.model.flat else voxel

    @property
    def _begins(self) -> np.ndarray:
        """The first voxel of the view, as the viewer has it."""
        side = np.array([self.side - 1, self.side - 1, 0])
        return self._standing(self._start + side if self.model.flat else self._start)

    @property
    def _start(self) -> np.ndarray:
        """The first voxel of the view."""
        inverse = np.linalg.inv(self.subject.affine)
        return np.rint(inverse[:3, :3] @ self.view.affine[:3, 3] + inverse[:3, 3]).astype(int)

    def _locate(self) -> None:
        """The whole scan with the units of the view outlined, for who opens it; a double click there moves the view."""
        if self._where.selected_index is None:
            return
        subject, stride, spacing = self.subject, self.model.stride, self.model.config.data.spacing
        place = np.zeros([-(-n // stride) for n in subject.array.shape], bool)
        low, high = self._start // stride, -(-(self._start + self.side) // stride)
        place[tuple(slice(max(a, 0), max(b, 1)) for a, b in zip(low, high, strict=True))] = True
        where: dict[str, Any] = {}
        scan: Any = Volume(subject.array, subject.affine, subject.modality)
        if self.model.flat:
            scan, place, where = subject.array[..., 0], place[..., 0], {"spacing": (spacing, spacing)}
        if self._map is None:
            look: dict[str, Any] = {
                "window": list(self.viewer.window),
                "pick": True,
                "title": "Outlined: the view above",
            }
            self._map = view(scan, mask=place, unit=stride, **where, **look)
            self._map.hidden = "outline"
            self._map.observe(self._picked, "picked")
            self._where.children[0].children = [self._map]
        else:
            self._map.update(mask=place)
        if not self.model.flat:
            self._map.cursor = self.center.tolist()

    def _guess(self, name: str) -> np.ndarray | None:
        return self.model.rebuild(self.view, self._masks[name]) if self.model.rebuilds else None

    def _rebuild(self) -> None:
        """The student's reconstruction, only where somebody looks at it: it takes another forward pass."""
        if not self.model.rebuilds or not {"reconstruction", "error"} & set(self.viewer.shown):
            return
        if self._rebuilt is not self._masks:
            for number, name in enumerate(self._masks):
                self.viewer.update(number, reconstruction=self._guess(name))
            self._rebuilt = self._masks

    def _tell(self) -> None:
        self._table.value = self._as_html()
        try:
            self._copy.text = " ".join(self.settings)
        except UseError as error:
            self._copy.text, self._copy.why = "", str(error)

    def _as_html(self) -> str:
        found = self.numbers
        names = [name.replace("_", " ") for name in found["hidden"]]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ["hidden", *names, "chance"])
        rows = [
            f"<tr><td>{region}</td>"
            + "".join(f"<td>{shares[region]:.0%}</td>" for shares in found["hidden"].values())
            + f"<td>{found['chance']:.0%}</td></tr>"
            for region in self.view.shares
        ]
        facts = self.facts(self.choice)
        if "overlap" in found:
            facts.append(
                f"of what {names[0]} hides, {names[1]} hides {found['overlap']:.0%} (chance {found['overlap_chance']:.0%})"
            )
        return f'<div class="smartlab-shares"><table>{head}{"".join(rows)}</table><div>{"<br>".join(facts)}</div></div>'

    # ---- without a kernel ----

    def early(self) -> None:
        """The viewer's."""
        self.viewer.early()

    def figure(self, index: Any = None) -> Figure:
        """What is shown now as a Matplotlib figure, as `SliceViewer.figure`."""
        return self.viewer.figure(index)

    def save_html(self, path: str | Path) -> Path:
        """Write a page that needs neither kernel nor network: the viewer as it is now, and masks of every strategy by
        some ratios and draws, of the clean and the noisy teacher."""
        title = self.title or "What is hidden"
        write_text(Path(path), saved.html(self, self.viewer, self.choice, title, self.controls.about))
        return Path(path)

    def still(self) -> str:
        """The viewer's."""
        return self.viewer.still()

    def _widget(self) -> Any:
        return self.box._repr_mimebundle_()

    def __repr__(self) -> str:
        grid = self.model.units(self.view)
        return f"Explorer({' × '.join(map(str, self.view.image.shape))}, {' × '.join(map(str, grid))} units, {self.choice.strategy})"


def explore(
    scan: Any,
    encoder: Any = None,
    *,
    case: int | str = 0,
    labels: Any = None,
    label_names: Mapping[int, str] | None = None,
    center: Sequence[int] | None = None,
    size: int | None = None,
    window: str | Sequence[float] | None = None,
    plane: str = "axial",
    title: str = "",
    channel: int = 0,
    **settings: Any,
) -> Explorer:
    """The live mask explorer: strategies, ratio, noise and heads on a scan of one's own, in JupyterLab.

    scan:     a file or DICOM folder, or a list of one per channel, a `Volume`, a `Mammogram`, an array at the
              encoder's spacing, or a store, of which `case` is looked at (a number, or a key of `store.cases`).
    encoder:  a run folder (then reconstructions can be seen, too), an exported file, or an encoder; by default the
              one that comes with smartlab. Mammograms need a run of their own.
    labels:   a segmentation on the scan's grid, or its file; label_names: number -> name.
    center:   voxel, at the encoder's spacing, that the view is around; by default the lesion, else the body's middle.
    size:     voxels per side of the view; by default as in training, at least 64.
    channel:  which of several channels is shown, from 0; the model sees all.
    settings: where the controls begin: strategy, against, ratio, hint, temperature, p_attention, seed, guide,
              dropout, draw, importance, shown (see `Choice`); by default as the encoder was trained.

    >>> explorer = explore("scan.nii.gz", strategy="attention_high", against="random")
    >>> explorer.settings
    ['mask.strategy=attention_high', 'mask.ratio=0.7', ...]
    """
    model = Model(encoder)
    choice = Choice.of(model, settings)
    side = _side(model, size)
    data = model.config.data
    kind = {"modality": data.modality, "channels": model.config.encoder.in_channels, "channel": channel}
    about: dict[str, Any] = {"case": case, "labels": labels, "label_names": label_names, **kind}
    subject = subject_of(scan, data.spacing, model.flat, **about)
    if center is not None:
        subject = replace(subject, center=np.asarray(center, int))
    look = {"plane": plane} | ({} if window is None else {"window": window})
    return Explorer(subject, model, side, choice, title, look)


def _side(model: Model, size: int | None) -> int:
    """Voxels per side of a view, checked."""
    trained = model.config.data.view
    if model.flat:
        if size not in (None, trained):
            raise UseError(f"size={size}", expected=f"{trained}, the view that this model was trained on")
        return trained
    total = model.encoder.total
    side = max(trained, -(-SEEN_AT_LEAST // total) * total) if size is None else size
    if side < total or side % total:
        raise UseError(f"size={size} voxels", expected=f"a multiple of {total}, the encoder's total stride")
    return side
