"""What a person looks at: slices, masks, embeddings and plots, in one visual style."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smartlab.viewers.explore import Explorer
    from smartlab.viewers.scene import Panel
    from smartlab.viewers.slices import SliceViewer, view

_PUBLIC = {"Explorer": "explore", "Panel": "scene", "SliceViewer": "slices", "view": "slices"}
_MODULES = {name: f"{__name__}.{name}" for name in ("embedding", "masks", "slices")}
_MODULES |= {"plots": "smartlab.core.plots"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
