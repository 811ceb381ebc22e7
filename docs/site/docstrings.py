"""The docstrings of smartlab as Markdown, for the API pages.

They are plain text in one habit: a sentence, then shapes and units as aligned `name: …` lines, then an
example after `>>>`. Here the lines become a list and the example a block of code.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

FIELD = re.compile(r"^([a-z_]\w*(?:, \w+)*): +(\S.*)$")
COMMENT = re.compile(r"  # (?!type:|noqa)([^\"']+)$")
ITEM = re.compile(r"^(?:[-*]|\d+\.) ")


def as_markdown(text: str) -> str:
    """Lists, code and examples set off, as Markdown wants them."""
    out: list[str] = []
    lines = text.split("\n")
    at = 0

    def apart() -> None:
        if out and out[-1].strip():
            out.append("")

    while at < len(lines):
        line = lines[at]
        before = lines[at - 1] if at else ""
        if line.startswith(">>>"):
            apart()
            out.append("```python")
            while at < len(lines) and lines[at].strip():
                code = re.sub(r"\s+# doctest: .*", "", lines[at])
                out.append(code[4:] if code.startswith((">>>", "...")) else f"# {code}")
                at += 1
            out += ["```", ""]
            continue
        field = FIELD.match(line)
        if field and (not before.strip() or FIELD.match(before) or before.startswith("  ")):
            if not (out and out[-1].startswith(("- `", "    "))):
                apart()
            out.append(f"- `{field[1]}`: {field[2]}")
            while at + 1 < len(lines) and lines[at + 1].startswith("  "):
                at += 1
                out.append(f"    {lines[at].strip()}")
            at += 1
            continue
        if ITEM.match(line) and not ITEM.match(before) and not before.startswith("  "):
            apart()
        if (
            line.startswith("    ")
            and before.strip()
            and not before.startswith(" ")
            and not ITEM.match(before)
        ):
            apart()
        out.append(line)
        at += 1
    return "\n".join(out)


class PlainDocstrings(griffe.Extension):
    """Turn every docstring into Markdown as it is read; the comment behind a field is its docstring."""

    def on_instance(self, *, node: Any, obj: griffe.Object, agent: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
        elif isinstance(obj.parent, griffe.Class) and isinstance(node, ast.AnnAssign):
            lines = obj.lines_collection[agent.filepath][node.lineno - 1 : node.end_lineno]
            said = [part[1] for line in lines if (part := COMMENT.search(line))]
            if said:
                obj.docstring = griffe.Docstring(" ".join(said), lineno=node.lineno, parent=obj)
