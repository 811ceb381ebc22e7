"""The controls of the mask explorer, and what they say: to `make_mask`, and as settings of a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from pydantic import ValidationError

from smartlab.core.config import load_config, parse_overrides
from smartlab.core.errors import UseError, one_of, problems_of
from smartlab.core.settings import MaskConfig, TeacherConfig
from smartlab.data.images.grid import in_mm
from smartlab.masking import STRATEGIES
from smartlab.viewers.front import front_end

if TYPE_CHECKING:
    from smartlab.viewers.subject import Model

# what is laid over the image, and how the mask is drawn
SHOWN: dict[str, tuple[tuple[str, ...], str]] = {
    "student's view": (("mask",), "opaque"),
    "tint": (("mask",), "tint"),
    "outline": (("mask",), "outline"),
    "attention": (("mask", "attention"), "outline"),
    "reconstruction": (("mask", "reconstruction"), "outline"),
    "absolute error": (("mask", "error"), "outline"),
}


@dataclass(frozen=True)
class Choice:
    """What is hidden, by which look, and how it is shown.

    strategy, ratio, hint, temperature, p_attention: as `make_mask` takes them;  seed: of its generator.
    against:    a second strategy beside the first; "" for none.
    guide:      the look that guides: "clean", or "noisy", which misses `dropout` of its input by `draw`.
    importance: "mean" of the heads, "received", or "head 1", "head 2", …
    shown:      one of `SHOWN`.
    """

    strategy: str = "random"
    against: str = ""
    ratio: float = 0.7
    hint: float = 0.1
    temperature: float = 1.0
    p_attention: float = 1.0
    seed: int = 0
    guide: str = "clean"
    dropout: float = 0.7
    draw: int = 0
    importance: str = "mean"
    shown: str = "tint"

    @classmethod
    def of(cls, model: Model, given: Mapping[str, Any]) -> Choice:
        """As the model was trained, with what is given on top."""
        known = [field.name for field in fields(cls)]
        for name in given:
            one_of("unknown setting", name, known, " of the mask explorer")
        mask, teacher = model.config.mask, model.config.teacher
        trained = {name: getattr(mask, name) for name in ("strategy", "ratio", "hint", "temperature")}
        trained |= {
            "dropout": teacher.patch_dropout or 0.7,
            "importance": "received" if mask.importance == "received" else "mean",
        }
        choice = cls(**trained | dict(given))
        choice.check(model)
        return choice

    def check(self, model: Model) -> None:
        """Refuse what makes no sense, or what this model cannot do."""
        for name, allowed in self.options(model).items():
            if (value := getattr(self, name)) not in allowed:
                raise UseError(
                    f"{name}={value!r} is nothing this model has", expected=", ".join(map(repr, allowed))
                )
        try:
            names = ("strategy", "ratio", "hint", "temperature", "p_attention")
            MaskConfig.model_validate({name: getattr(self, name) for name in names})
            TeacherConfig(patch_dropout=self.dropout)
        except ValidationError as error:
            first = problems_of(error)[0]
            raise UseError(f"{first.place}={first.value!r}: {first.why}") from None

    @staticmethod
    def options(model: Model) -> dict[str, list[str]]:
        """What can be chosen from with this model."""
        strategies = [s for s in STRATEGIES if model.heads or not s.startswith("attention")]
        looks = [f"head {i + 1}" for i in range(model.heads)]
        hidden = {
            "attention": model.heads,
            "reconstruction": model.rebuilds,
            "absolute error": model.rebuilds,
        }
        return {
            "strategy": strategies,
            "against": ["", *strategies],
            "importance": ["mean", *(["received"] if model.receives else []), *looks],
            "guide": ["clean", "noisy"] if model.heads and not model.flat else ["clean"],
            "shown": [name for name in SHOWN if hidden.get(name, True)],
        }

    def drawing(self, mask: MaskConfig) -> dict[str, Any]:
        """What `make_mask` takes by keyword, the rest as in this training."""
        own = {"hint": self.hint, "temperature": self.temperature, "p_attention": self.p_attention}
        return mask.drawing() | own | {"ratio_min": None}

    def matters(self, name: str) -> bool:
        """Whether a control changes anything now."""
        chosen = {self.strategy, self.against}
        guided = any(s.startswith("attention") for s in chosen)
        return {
            "hint": "attention_hint" in chosen,
            "temperature": "attention_sample" in chosen,
            "p_attention": bool(chosen - {"", "random"}),
            "importance": guided,
            "guide": guided or self.shown == "attention",
            "dropout": self.guide == "noisy",
            "draw": self.guide == "noisy",
        }.get(name, True)

    def words(self, model: Model) -> list[str]:
        """The choice as `key=value` for `smartlab pretrain`, checked against the model's own configuration."""
        if self.importance.startswith("head") and self.strategy.startswith("attention"):
            raise UseError("training follows the mean of all heads or what is received, not one head")
        mask, teacher = model.config.mask, model.config.teacher
        words = [f"mask.strategy={self.strategy}", f"mask.ratio={self.ratio:g}"]
        if self.strategy == "attention_hint":
            words += [f"mask.hint={self.hint:g}", f"mask.hint_from={mask.hint_from}"]
            words.append(f"mask.hint_refill={str(mask.hint_refill).lower()}")
        if self.strategy == "attention_sample":
            words.append(f"mask.temperature={self.temperature:g}")
        if self.strategy != "random":
            words.append(f"mask.p_attention={self.p_attention:g}")
        if self.strategy.startswith("attention"):
            words += [
                f"mask.importance={'received' if self.importance == 'received' else 'cls'}",
                f"teacher.guide={self.guide}",
            ]
            if self.guide == "noisy":
                words.append(f"teacher.patch_dropout={self.dropout:g}")
                words.append(f"teacher.dropout_unit={teacher.dropout_unit}")
        _check(model.config.model_dump_json(), tuple(words))
        return words


@lru_cache(256)  # a seed or a draw of noise leaves the words as they are
def _check(config: str, words: tuple[str, ...]) -> None:
    """Whether a training of this configuration takes them."""
    load_config(json.loads(config), parse_overrides([*words]))


class Controls(widgets.VBox):
    """A column of widgets, `numbers` among them; `choice` is what they say, and they follow it."""

    choice = traitlets.Instance(Choice)

    def __init__(self, model: Model, choice: Choice, numbers: widgets.Widget) -> None:
        options = Choice.options(model)
        plain = {"style": {"description_width": "84px"}, "layout": {"width": "auto"}}

        def pick(text: str, name: str, tip: str, empty: str = "") -> Any:
            pairs = [(o.replace("_", " ") or empty, o) for o in options[name]]
            return widgets.Dropdown(
                description=text, options=pairs, value=getattr(choice, name), tooltip=tip, **plain
            )

        def slide(text: str, name: str, low: float, high: float, tip: str, step: float = 0.01) -> Any:
            value = getattr(choice, name)
            kind = widgets.IntSlider if step == 1 else widgets.FloatSlider
            low, high = min(low, value), max(high, value)
            return kind(description=text, min=low, max=high, step=step, value=value, tooltip=tip, **plain)

        self.about = _fixed(model)
        self.parts: dict[str, Any] = {
            "strategy": pick("strategy", "strategy", "which units are hidden"),
            "against": pick("beside it", "against", "a second strategy on the same crop", "nothing"),
            "ratio": slide("ratio", "ratio", 0.02, 0.98, "share of the units that is hidden"),
            "hint": slide("hint", "hint", 0.0, 1.0, "attention hint: share of what is hidden that is given back"),
            "temperature": widgets.FloatLogSlider(description="temperature", min=-2, max=1, step=0.05, value=choice.temperature,
                                                  readout_format=".2f", tooltip="attention sample: low follows attention closely", **plain),
            "p_attention": slide("p", "p_attention", 0.0, 1.0, "share of the draws that follow the strategy; the others are random"),
            "seed": slide("seed", "seed", 0, 199, "of the draw", 1),
            "guide": pick("teacher", "guide", "whether the look that guides sees the whole view"),
            "dropout": slide("misses", "dropout", 0.05, 0.95, "noisy teacher: share of its input that it does not see"),
            "draw": slide("draw", "draw", 0, 49, "noisy teacher: which part it does not see", 1),
            "importance": pick("follows", "importance", "attention of all heads, of one, or received from all tokens"),
            "shown": pick("show", "shown", "how the mask lies over the image"),
        }  # fmt: skip
        play = widgets.Play(
            value=choice.seed,
            min=0,
            max=self.parts["seed"].max,
            interval=400,
            tooltip="a new draw every 0.4 s",
            layout={"width": "auto"},
        )
        widgets.jslink((play, "value"), (self.parts["seed"], "value"))
        part = self.parts
        groups = {
            "": [part["shown"]],
            "Mask": [
                part[n]
                for n in ("strategy", "against", "ratio", "hint", "temperature", "p_attention", "seed")
            ],
            "Attention": [part[n] for n in ("guide", "dropout", "draw", "importance")],
        }
        groups["Mask"].append(widgets.HBox([widgets.Label(layout={"width": "84px"}), play]))
        about = widgets.HTML(f'<div class="smartlab-about">{self.about}</div>')
        children = [
            one for name, inside in groups.items() for one in [*([_heading(name)] if name else []), *inside]
        ]
        super().__init__([*children, numbers, about], layout={"width": "290px", "flex": "0 0 290px"})
        self._busy = False
        self.observe(lambda change: self._write(change["new"]), "choice")
        self.choice = choice
        for one in self.parts.values():
            one.observe(self._read, "value")

    def _read(self, _: Any) -> None:
        if not self._busy:
            self.choice = Choice(**{name: part.value for name, part in self.parts.items()})

    def _write(self, choice: Choice) -> None:
        self._busy = True
        for name, value in asdict(choice).items():
            part = self.parts[name]
            if isinstance(
                part, (widgets.IntSlider, widgets.FloatSlider)
            ):  # set by code to what no hand reaches
                part.min, part.max = min(part.min, value), max(part.max, value)
            part.value = value
            part.disabled = not choice.matters(name) or len(getattr(part, "options", "ab")) < 2
        self._busy = False


def _heading(text: str) -> widgets.HTML:
    return widgets.HTML(f'<div class="smartlab-heading">{text}</div>')


def _fixed(model: Model) -> str:
    """What no control changes, and why."""
    data, low_high = model.config.data, "{:g} to {:g}".format(*model.config.data.window)
    sides = in_mm(np.multiply(model.stride, data.spacing).tolist())
    vit = "mae.input and encoder.patch" if model.flat else "encoder.patch"
    by = vit if model.config.encoder.kind == "vit" else "semantic.stage"
    said = [
        f"Units of {model.stride} {'pixels' if model.flat else 'voxels'}, {sides} mm: {by} of the training.",
        "Boxes of block: 2 to 4 units a side.",
        f"Values as the student gets them, {low_high}.",
    ]
    if not model.heads:
        said.append("No semantic attention in this encoder: nothing to be guided by.")
    if not model.rebuilds:
        said.append(
            "Reconstructions need a run folder with its decoder."
            if model.method is None
            else "This run has no decoder."
        )
    return " ".join(said)


class CopyButton(anywidget.AnyWidget):
    """A line of text with a button that copies it; without text, the button rests and the line says why."""

    _esm = front_end("copy.js")
    _css = front_end("slices.css", "explore.css")

    label = traitlets.Unicode("Copy as settings").tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
    why = traitlets.Unicode().tag(sync=True)
