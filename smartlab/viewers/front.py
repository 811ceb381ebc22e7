"""What every viewer has: the front end's files, a picture of itself, and one way to come into a notebook."""

from __future__ import annotations

import base64
import io
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.core import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONT_END = ("draw.js", "slices.js", "tools.js", "hand.js", "link.js")


@cache
def front_end(*names: str) -> str:
    """The files of `static/` as one text."""
    folder = Path(__file__).parent / "static"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


class Pictured:
    """A viewer whose picture stands beside it, and remains where no kernel answers."""

    name: str  # of this viewer alone
    alt: str  # what the picture shows, for who cannot see it

    def figure(self) -> Figure:
        """What is shown now as a Matplotlib figure."""
        raise NotImplementedError

    def save_png(self, path: str | Path) -> Path:
        """Write the figure as PNG, whole or not at all."""
        return plots.save(self.figure(), path)

    def still(self) -> str:
        """The figure as an HTML image, which the widget hides once it is drawn itself."""
        data = io.BytesIO()
        self.figure().savefig(data, format="png", dpi=80, facecolor="white")
        text = base64.b64encode(data.getvalue()).decode()
        # JupyterLab puts a line below the picture of a reopened notebook, whose widgets are gone with the kernel
        after = f".jp-OutputArea-child:has(.smartlab-still-{self.name}) + .jp-OutputArea-child"
        return f"<style>{after} .jupyter-widgets:not(:has(*)) {{ display: none }}</style>" + (
            f'<img class="smartlab-still smartlab-still-{self.name}" alt="{escape(self.alt)}" '
            f'style="max-width:100%" src="data:image/png;base64,{text}">'
        )

    def early(self) -> None:
        """What the page gets unasked, with the widget."""

    def _widget(self) -> Any:
        """What Jupyter shows as the widget."""
        return super()._repr_mimebundle_()  # type: ignore[misc]

    def _ipython_display_(self, **_: Any) -> None:
        from IPython.display import display

        display({"text/html": self.still(), "text/plain": repr(self)}, raw=True)
        self.early()
        if (bundle := self._widget()) is not None:
            data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
            display({**data, "text/plain": repr(self)}, metadata=metadata, raw=True)
