"""What a plan needs to know of notebooks: where they are, which parameters they have."""

from __future__ import annotations

import ast
import json
import string
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from smartlab import notebook
from smartlab.core.errors import UseError, near, unknown
from smartlab.core.places import notebook_folder
from smartlab.notebook import NotebookParameters

Scalar = bool | int | float | str | None


def locate(name: str, plan: Path) -> Path:
    """A shipped notebook by name, or a path relative to the plan."""
    candidates = [plan.parent / name, notebook_folder() / f"{name}.ipynb"]
    for path in candidates:
        if path.suffix == ".ipynb" and path.is_file():
            return path.resolve()
    known = sorted(p.stem for p in notebook_folder().glob("*.ipynb"))
    also = ", or the path of an .ipynb file relative to the plan"
    raise unknown("no notebook", name, known, also=also, path=plan)


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Name -> default of the plain values in the cell tagged `parameters`."""
    return {name: field.default for name, field in declared(path).model_fields.items()}


def declared(path: Path) -> type[NotebookParameters]:
    """The parameters that a notebook declares, with types and limits, by reading its tagged cell and running nothing."""
    return _declared(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _declared(path: Path, changed: int) -> type[NotebookParameters]:
    fields: dict[str, Any] = {}
    for node in _tagged_cell(path):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and not target.id.startswith("_") and value is not None:
                fields[target.id] = _field(value, getattr(node, "annotation", None))
    return NotebookParameters.of(fields)


def _field(value: ast.expr, annotation: ast.expr | None) -> tuple[Any, Any]:
    """Type and default of a parameter: the default's type where none is written, or one that only a kernel knows."""
    kind = default = None
    # else no plain value: any type will do
    with suppress(ValueError, TypeError, RecursionError, MemoryError):
        default = ast.literal_eval(value)
    with suppress(ValueError, TypeError):
        kind = annotation and _type(annotation)
    return kind or (Any if default is None else type(default)), default


def _tagged_cell(path: Path) -> list[ast.stmt]:
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
        return ast.parse("\n".join(lines)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UseError(
            "the cell tagged `parameters` is not Python",
            path=path,
            found=error,
            expected="lines such as steps = 100",
        ) from None


_BUILT_IN = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict)}


def _type(annotation: ast.expr) -> Any:
    """What an annotation means that is written with `smartlab.notebook`'s words or pydantic's; None for any other."""
    match annotation:
        case ast.Name(name):
            return _BUILT_IN.get(name) or (getattr(notebook, name, None) if name[0].isupper() else None)
        case ast.Subscript(ast.Name("Annotated"), ast.Tuple([kind, ast.Call(ast.Name("Field"), [], limits)])):
            given = {limit.arg: ast.literal_eval(limit.value) for limit in limits if limit.arg}
            return Annotated[_type(kind), Field(**given)]
        case ast.Subscript(ast.Name(name), inside) if name[0].isupper() and hasattr(notebook, name):
            return getattr(notebook, name)[ast.literal_eval(inside)]
    return None


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
