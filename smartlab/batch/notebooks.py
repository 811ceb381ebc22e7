"""What a plan needs to know of notebooks: where they are, which parameters they have."""

from __future__ import annotations

import ast
import json
import string
from functools import lru_cache
from pathlib import Path
from typing import Any

from smartlab.core.errors import UseError, near

Scalar = bool | int | float | str | None


def locate(notebook: str, plan: Path) -> Path:
    """A shipped notebook by name, or a path relative to the plan."""
    from smartlab.notebook import notebook_folder

    candidates = [plan.parent / notebook, notebook_folder() / f"{notebook}.ipynb"]
    for path in candidates:
        if path.suffix == ".ipynb" and path.is_file():
            return path.resolve()
    known = sorted(p.stem for p in notebook_folder().glob("*.ipynb"))
    raise UseError(
        f"no notebook {notebook!r}",
        path=plan,
        expected=f"one of {', '.join(known)}, or the path of an .ipynb file relative to the plan",
        fix=near(notebook, known),
    )


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Name -> default of the plain values in the cell tagged `parameters`."""
    return dict(_parameters(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=64)
def _parameters(path: Path, changed: int) -> dict[str, Any]:
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
        sources = ["".join(c["source"]) for c in tagged]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UseError("is not a notebook", path=path, found=f"{type(error).__name__}: {error}") from None
    if len(sources) != 1:
        raise UseError(
            "must have exactly one cell tagged `parameters`",
            path=path,
            found=f"{len(sources)}",
            fix="add the tag in JupyterLab: property inspector, cell tags",
        )
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in sources[0].splitlines()]
    try:  # without IPython's own commands, such as %matplotlib inline
        body = ast.parse("\n".join(lines)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UseError(
            "the cell tagged `parameters` is not Python",
            path=path,
            found=error,
            expected="lines such as steps = 100",
        ) from None
    found = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                try:
                    found[target.id] = ast.literal_eval(value)
                except (ValueError, TypeError, RecursionError, MemoryError):
                    found[target.id] = None  # not a plain value: any type will do
    return found


def references(value: Scalar, known: list[str], step: str, path: Path) -> list[str]:
    """The names in braces; `{plan}` is the folder of the plan file."""
    if not isinstance(value, str) or "{" not in value:
        return []
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise UseError(f"{step}: {error}", path=path, found=repr(value), fix="write {{ for a brace") from None
    for name in names:
        if name not in known:
            raise UseError(
                f"{step} refers to {{{name}}}, which is no earlier step",
                path=path,
                found=repr(value),
                expected=f"one of {', '.join(f'{{{k}}}' for k in known)}",
                fix=near(name, known),
            )
    return names
