"""An explorer as one file: the viewer's page, with masks for every strategy, some ratios and some draws in it."""

from __future__ import annotations

import base64
import zlib
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from smartlab.core.errors import UseError
from smartlab.masking import hidden_count
from smartlab.viewers import page, sending
from smartlab.viewers.controls import SHOWN, Choice
from smartlab.viewers.front import front_end
from smartlab.viewers.looking import Looking
from smartlab.viewers.scene import Panel, stand
from smartlab.viewers.slices import SliceViewer

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEEDS, DRAWS = 5, 3  # of masks; of noise
START = "const data = pageData();\nnew Saved(new Page(data), document.querySelector('main'), data.saved);"


def html(looking: Looking, viewer: SliceViewer, choice: Choice, title: str, about: str) -> str:
    """The page as text: what is explored now, with everything else drawn beforehand."""
    content, buffers = sending.everything(viewer.scene)
    state = viewer.state() | {"meta": {**viewer.meta, "pick": False}}
    more = {"scripts": ("explore.js",), "start": START, "saved": drawn(looking, viewer, choice, about)}
    return page.html(title, state, content, buffers, **more)  # type: ignore[arg-type]


def drawn(looking: Looking, viewer: SliceViewer, choice: Choice, about: str) -> dict[str, Any]:
    """All that the page's controls can choose."""
    model = looking.model
    options = Choice.options(model)
    strategies = options["strategy"]
    shown = [name for name in options["shown"] if not {"reconstruction", "error"} & {*SHOWN[name][0]}]
    ratios, seeds = sorted({*RATIOS, choice.ratio}), sorted({*range(SEEDS), choice.seed})
    looks = [replace(choice, guide="clean")]
    if "noisy" in options["guide"]:
        looks += [replace(choice, guide="noisy", draw=draw) for draw in sorted({*range(DRAWS), choice.draw})]
    guided = [name.startswith("attention") for name in strategies]
    masks: list[Any] = []
    for number, look in enumerate(looks):
        every = [replace(look, strategy=name) for name in strategies]
        masks.append([
            [[_bits(looking, looking.hide(replace(one, ratio=ratio, seed=seed))) for seed in seeds] for ratio in ratios] if by_look or not number else []
            for one, by_look in zip(every, guided, strict=True)
        ])  # fmt: skip
    units = int(np.prod(model.units(looking.view)))
    now = choice if choice.guide == "noisy" else looks[0]
    return {
        "strategies": strategies,
        "guided": guided,
        "ratios": ratios,
        "seeds": seeds,
        "chance": [hidden_count(ratio, units) / units for ratio in ratios],
        "grid": list(viewer.scene.grid or ()),
        "masks": masks,
        "looks": [_look(looking, viewer, look) for look in looks],
        "words": [[_words(looking, replace(look, strategy=name)) for name in strategies] for look in looks],
        "shares": {
            region: np.round(_in_scene(looking, share), 4).ravel().tolist()
            for region, share in looking.view.shares.items()
        },
        "shown": [[name, *SHOWN[name]] for name in shown],
        "at": {
            "strategies": [
                strategies.index(choice.strategy),
                strategies.index(choice.against) if choice.against else -1,
            ],
            "ratio": ratios.index(choice.ratio),
            "seed": seeds.index(choice.seed),
            "look": looks.index(replace(now, strategy=choice.strategy)),
            "shown": shown.index(choice.shown) if choice.shown in shown else 0,
        },
        "css": front_end("explore.css"),
        "about": about + (f" The noisy teacher misses {choice.dropout:.0%}." if len(looks) > 1 else ""),
    }


def _in_scene(looking: Looking, units: Any) -> np.ndarray:
    """(1, N) as the viewer has it: the units of a mammogram stand as its image does."""
    grid = looking.on_grid(units)
    return stand(grid) if looking.model.flat else grid


def _bits(looking: Looking, mask: Any) -> str:
    bits = np.packbits(np.ascontiguousarray(_in_scene(looking, mask)).ravel(), bitorder="little")
    return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode()


def _look(looking: Looking, viewer: SliceViewer, choice: Choice) -> dict[str, Any]:
    """A look of the teacher: its name, what is told of it, and the messages that bring it into every panel."""
    scene, messages = copy(viewer.scene), []
    scene.layers = list(scene.layers)
    attention = looking.seen(choice)
    for panel in range(len(scene.layers) if attention is not None else 0):
        names = scene.change(panel, Panel(attention=attention))
        content, buffers = sending.changed(scene, panel, names, viewer.cursor)
        spans = sending.describe(scene, viewer.window, "", "")["spans"]
        messages.append(
            [{**content, "meta": {"spans": spans}}, *(base64.b64encode(b).decode() for b in buffers)]
        )
    return {
        "name": f"noisy, draw {choice.draw}" if choice.guide == "noisy" else "clean",
        "facts": looking.facts(choice),
        "messages": messages,
    }


def _words(looking: Looking, choice: Choice) -> str:
    """The settings, with a place for the ratio; or why there are none."""
    try:
        words = choice.words(looking.model)
    except UseError as error:
        return str(error)
    return " ".join("mask.ratio={ratio}" if word.startswith("mask.ratio=") else word for word in words)
