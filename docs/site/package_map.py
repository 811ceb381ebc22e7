"""The map of the package, drawn from its imports: `python docs/site/package_map.py` writes docs/images/map.svg.

A room is a folder of smartlab/, or the modules beside them that share the first word of their names. Rooms
stand in an order in which they only import upwards, as far as there is one; an arrow down is drawn in red.
"""

from __future__ import annotations

import ast
import html
import textwrap
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MAP = REPO / "docs" / "images" / "map.svg"
PREFERRED = [
    "core",
    "data",
    "masking",
    "models",
    "methods",
    "training",
    "interop",
    "evaluation",
    "viewers",
    "notebook",
    "batch",
    "cli",
]
GROUND = ("core",)  # everything may use it: arrows to it are not drawn
SAID = {  # where the first sentence of the room's own docstring says less
    "data": "A cohort on disk becomes crops: manifest, readers, store, loader; and the phantoms.",
    "notebook": "What every notebook shares: parameters checked, results written.",
    "evaluation": "Every downstream task behind one `evaluate`, with intervals over patients.",
    "batch": "Ablations: notebooks over a grid of parameters, by papermill and Dask.",
}
BOX, HEIGHT, GAP, LEFT, TOP = 560, 46, 12, 10, 10


def room_of(path: Path) -> str:
    """The room of a file of the package."""
    return path.relative_to(REPO / "smartlab").with_suffix("").parts[0].split("_")[0]


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it imports, at its top, inside functions and for types alike."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((REPO / "smartlab").rglob("*.py")):
        room = room_of(path)
        if not room:  # __init__ and __main__ only pass names on
            continue
        found[room] |= set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module == "smartlab":
                modules = [f"smartlab.{name.name}" for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            for module in modules:
                there = module.removeprefix("smartlab.").split(".")[0].split("_")[0]
                if module.startswith("smartlab.") and there != room and _is_room(there):
                    found[room].add(there)
    return dict(found)


def _is_room(name: str) -> bool:
    return any((REPO / "smartlab").glob(f"{name}.py")) or (REPO / "smartlab" / name).is_dir()


def order(uses: dict[str, set[str]]) -> list[str]:
    """The rooms, each below all that it uses where that can be had, else as preferred."""
    left = sorted(uses, key=lambda r: (PREFERRED.index(r) if r in PREFERRED else len(PREFERRED), r))
    done: list[str] = []
    while left:
        free = [room for room in left if not (uses[room] - set(done)) & set(left)]
        done.append((free or left)[0])
        left.remove(done[-1])
    return done


def sentence(room: str) -> str:
    """What the room is for."""
    if room in SAID:
        return SAID[room]
    folder = REPO / "smartlab" / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return said.split("\n\n")[0].replace("\n", " ").split(". ")[0]


def drawing() -> str:
    """The map as SVG."""
    uses = arrows()
    rooms = [room for room in order(uses) if room not in GROUND]
    ground = [room for room in order(uses) if room in GROUND]
    middle = {room: TOP + (i + 1) * (HEIGHT + GAP) + HEIGHT / 2 for i, room in enumerate(rooms)}
    drawn = {(a, b) for a in rooms for b in uses[a] if b in middle}
    behind = {(a, b) for a, b in drawn if any((a, c) in drawn and (c, b) in drawn for c in rooms)}
    width, height = LEFT + BOX + 270, TOP + (len(rooms) + 1) * (HEIGHT + GAP) + 4
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="system-ui, sans-serif">',
        "<title>The rooms of smartlab and what they import</title>",
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
            for name, colour in (("near", "#1f6f8b"), ("far", "#b9c4cc"), ("down", "#c0392b"))
        ),
        "</defs>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for a, b in sorted(drawn, key=lambda pair: (pair not in behind, pair)):
        start, end = middle[a] - 6, middle[b] + 6
        kind = "down" if end > start else "far" if (a, b) in behind else "near"
        reach = LEFT + BOX + 34 + 27 * abs(rooms.index(a) - rooms.index(b))
        colour = {"near": "#1f6f8b", "far": "#b9c4cc", "down": "#c0392b"}[kind]
        edge = LEFT + BOX
        out.append(
            f'<path d="M{edge} {start:g}C{reach} {start:g} {reach} {end:g} {edge + 2} {end:g}" fill="none" '
            f'stroke="{colour}" stroke-width="{1.2 if kind == "far" else 1.8}" marker-end="url(#{kind})">'
            f"<title>{a} imports {b}</title></path>"
        )
    out += _box(", ".join(ground), "The ground: every room may use these (arrows not drawn).", TOP, "#e8ecef")
    for room in rooms:
        out += _box(room, sentence(room), middle[room] - HEIGHT / 2, "#f4f8fa")
    return "\n".join([*out, "</svg>"]) + "\n"


def _box(name: str, text: str, y: float, fill: str) -> list[str]:
    said = textwrap.shorten(text.replace("`", ""), 92, placeholder=" …")
    return [
        f'<rect x="{LEFT}" y="{y:g}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="#8fa3b0"/>',
        f'<text x="{LEFT + 12}" y="{y + 19:g}" font-size="14" font-weight="600" fill="#17303d">{name}</text>',
        f'<text x="{LEFT + 12}" y="{y + 36:g}" font-size="11.5" fill="#44565f">{html.escape(said)}</text>',
    ]


if __name__ == "__main__":
    MAP.write_text(drawing(), encoding="utf-8")
    print(MAP.relative_to(REPO))
