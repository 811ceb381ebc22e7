"""The little that every notebook shares: validated parameters in, one honest `result.json` out.

A notebook declares its parameters as plain scalars in a cell tagged `parameters`, then reads them
into one model before any work:

>>> class Parameters(NotebookParameters):
...     patients: int = Field(ge=1)
...     out: str
>>> p = Parameters.read(globals())

A wrong type or value stops there, and so does a parameter nobody knows: papermill would inject a
misspelt name without a word.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

import smartlab
from smartlab.errors import UseError

_JUPYTER = {"In", "Out", "exit", "quit", "get_ipython", "open"}


class NotebookParameters(BaseModel):
    """Base of a notebook's parameters; subclass it with one field per parameter."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def read(cls, namespace: Mapping[str, Any]) -> Self:
        """Validate the plain values of `namespace` (the notebook's globals) against the fields."""
        plain = (str, int, float, bool, list, tuple, dict, type(None))
        given = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_") and name not in _JUPYTER and isinstance(value, plain)
        }
        unknown = [name for name in given if name not in cls.model_fields]
        if unknown:
            near = difflib.get_close_matches(unknown[0], list(cls.model_fields), 1)
            raise UseError(
                f"unknown notebook parameter {unknown[0]!r}",
                expected=f"one of {', '.join(cls.model_fields)}",
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise UseError(
                f"notebook parameter {name!r}: {first['msg']}", found=repr(first["input"])
            ) from None


def code_version() -> str:
    """Package version, with the commit when this is a checkout ("0.1.0+abc1234", "-changed" if edited)."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return smartlab.__version__
    try:
        ask = ["git", "-C", str(folder), "describe", "--always", "--dirty=-changed", "--abbrev=8"]
        commit = subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return smartlab.__version__
    return f"{smartlab.__version__}+{commit}"


def finish(
    out: str | Path,
    *,
    step: str,
    parameters: NotebookParameters,
    metrics: Mapping[str, Any],
    headline: str,
    figures: list[str | Path] | None = None,
    data: str = "",
    smoke: bool = True,
) -> dict[str, Any]:
    """Write `out/result.json`: what was run on what, and what came out.

    metrics:  name -> number, or {"value", "low", "high", "n"} where there is an interval.
    headline: one line for the results table.
    data:     fingerprint of the data the numbers were computed on.
    smoke:    True for a small demonstration run, whose numbers mean nothing beyond "it works".
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "step": step,
        "headline": headline,
        "smoke": smoke,
        "metrics": dict(metrics),
        "parameters": parameters.model_dump(mode="json"),
        "data": data,
        "code": code_version(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "figures": [os.path.relpath(figure, out) for figure in figures or []],
    }
    temporary = out / ".result.json.tmp"
    temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(temporary, out / "result.json")
    return result
