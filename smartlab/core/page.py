"""Pages for the browser in one visual style, which ask no network: the tour's, and the report of a batch."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">{refresh}
<link rel="icon" href="data:,"><title>smartlab: {title}</title>
<style>
body {{ font: 17px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2.5rem auto; padding: 0 1.2rem; color: #1a2530 }}
a {{ color: #0b5394 }} h1 {{ margin: 0; font-size: 2rem; line-height: 1.25 }} h2 {{ margin: 0 0 .3rem; font-size: 1.45rem }}
h3 {{ margin: 1.6rem 0 .2rem; font-size: 1.12rem }}
body > h2 {{ border-top: 1px solid #d5dbe1; margin-top: 2.2rem; padding-top: 1.4rem }}
table {{ border-collapse: collapse; margin: 1.2rem 0; width: 100%; font-size: .95rem }}
td, th {{ text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #d5dbe1; vertical-align: top }}
.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }}
section {{ border-top: 1px solid #d5dbe1; padding: 1.6rem 0 }} p {{ margin: .3rem 0 .8rem }}
figure {{ margin: 1rem 0 1.4rem }} figure img {{ display: block; max-width: 100%; border-radius: 4px }}
figcaption {{ color: #44515d; font-size: .95rem; margin-top: .5rem }}
iframe {{ border: 1px solid #d5dbe1; border-radius: 4px; width: 100%; height: 46rem }}
details {{ margin: .8rem 0 }} summary {{ cursor: pointer; color: #44515d }}
code {{ background: #f0f3f6; border-radius: 3px; padding: .05rem .3rem; font-size: .92em }}
.scroll {{ overflow-x: auto }} .scroll table {{ margin: .6rem 0; min-width: 60%; width: auto }} .scroll td img {{ border-radius: 4px; width: 21rem; display: block }}
.headline {{ font-size: 1.12rem; font-weight: 600 }} .failed {{ color: #a4262c }} small, .waiting {{ color: #5a6672 }}
.pair {{ display: flex; flex-wrap: wrap; gap: 0 1.5rem }} .pair figure {{ margin: .6rem 0 }}
progress {{ width: 100%; height: .7rem; accent-color: #0072B2 }}
svg {{ display: block; margin-top: .1rem }}
</style></head><body>
<h1>{title}</h1>
{body}</body></html>
"""


def page(title: str, body: str, *, refresh: int = 0) -> str:
    """The whole page; `refresh`: seconds after which the browser reads it again, for one that still fills."""
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return _PAGE.format(title=html.escape(title), body=body, refresh=again)


def table(head: Sequence[str], body: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; the columns `numbers` stand to the right."""

    def row(tag: str, cells: Sequence[str]) -> str:
        styles = [' class="number"' if place in numbers else "" for place in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{s}>{c}</{tag}>' for s, c in zip(styles, cells, strict=True))}</tr>\n"

    rows = "".join(row("td", cells) for cells in body)
    return f'<div class="scroll"><table>\n{row("th", head)}{rows}</table></div>\n'


def figure(source: str, name: str, caption: str = "", link: str = "", width: int = 0) -> str:
    """A picture, as wide as said if there is room, with what to see in it; a click opens `link`."""
    wide = f' width="{width}"' if width else ""
    return (
        f'<figure><a href="{html.escape(link or source)}"><img alt="{html.escape(name)}"{wide} src="{html.escape(source)}"></a>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
    )


def inline(picture: Path, width: int = 0) -> str:
    """A picture as part of the page; with a `width` in pixels a small one, as lossy as that allows."""
    if not width:
        return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    from PIL import Image

    with Image.open(picture) as full, BytesIO() as small:
        shown = full.convert("RGB")
        shown.thumbnail((width, 10 * width))
        shown.save(small, "WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(small.getvalue()).decode()
