"""Masks of several strategies on the same crop, side by side with one cursor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smartlab.core.errors import UseError, one_of
from smartlab.viewers.scene import Panel
from smartlab.viewers.slices import SliceViewer, view


def compare(
    image: Any, masks: Mapping[str, Any], *, attention: Any = None, title: str = "", **kwargs: Any
) -> SliceViewer:
    """One linked panel per strategy; other arguments as for `view`.

    masks:     strategy -> (d, h, w) bool, true where hidden.
    attention: (heads, d, h, w) that guided the masks, the same for all panels; or one per strategy.

    >>> compare(crop, {"random": a, "attention_high": b}, attention=heads)
    """
    if not masks:
        raise UseError("no masks to compare", expected="a mask (d, h, w) for each strategy")
    each = attention if isinstance(attention, Mapping) else dict.fromkeys(masks, attention)
    for name in each:
        one_of("attention for", name, masks, ", which has no mask")
    panels = [Panel(name, mask, each.get(name)) for name, mask in masks.items()]
    return view(image, panels=panels, title=title, **kwargs)
