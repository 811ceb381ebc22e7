"""The YAML of a plan as it is written: found, read, checked for its keys, and overridden.

title: Does masking by attention help?
steps:
  - {name: pretrain, notebook: 02_pretrain}
  - {name: probe, notebook: 04_linear_probe, parameters: {run: "{pretrain}/run"}}
parameters: {steps: 2000}                                     # the same in every run
grid: {strategy: [random, attention_high]}                    # every combination
paired: {data: [a.json, b.json], root: [data/a, data/b]}  # values that go together
list: [{batch: 2}, {batch: 4, lr: 0.001}]                     # one set of values after another
seeds: [0, 1, 2]                                              # or a number of seeds
exclude: [{strategy: random, batch: 4}]
resources: {cores: 1, gpus: 0, memory: 4, minutes: 30}        # of each run; minutes are its limit
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smartlab.batch.notebooks import Scalar
from smartlab.core.errors import UseError, misfit, one_of, problems_of, unknown
from smartlab.core.places import notebook_folder


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Resources(_Strict):
    """What one run needs. Runs are placed by all of these; only the time is enforced."""

    cores: int = Field(1, ge=1)  # also the number of threads a run computes with
    gpus: int = Field(0, ge=0)
    memory: float = Field(2.0, gt=0)  # GB
    minutes: float = Field(60.0, gt=0)  # limit: a run that takes longer is ended and counts as failed


class _SomeResources(_Strict):
    cores: int | None = Field(None, ge=1)
    gpus: int | None = Field(None, ge=0)
    memory: float | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)


class StepEntry(_Strict):
    """A step as written; `plan.Step` is what it means."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    notebook: str
    parameters: dict[str, Scalar] = {}
    resources: _SomeResources = _SomeResources()


class PlanFile(_Strict):
    """The file as written."""

    title: str
    about: str = ""
    notebook: str | None = None
    steps: list[StepEntry] = []
    parameters: dict[str, Scalar] = {}
    grid: dict[str, list[Scalar]] = {}
    list_: list[dict[str, Scalar]] = Field([], alias="list")
    paired: dict[str, list[Scalar]] | list[dict[str, list[Scalar]]] = []
    seeds: int | list[int] = []
    exclude: list[dict[str, Any]] = []
    resources: Resources = Resources()


def plan_folder() -> Path:
    return notebook_folder() / "plans"


def shipped_plans() -> list[str]:
    return sorted(path.stem for path in plan_folder().glob("*.yaml"))


def read_plan(
    plan: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> tuple[Path, PlanFile]:
    """A plan from a shipped name, a YAML file or a mapping, its keys and types checked, and overridden."""
    path, content = _read(plan)
    return path, _override(_checked(content, path), dict(overrides or {}), path)


def _checked(content: Mapping[str, Any], path: Path) -> PlanFile:
    try:
        return PlanFile.model_validate(content)
    except ValidationError as error:
        raise _explain(error, path) from None


def _read(plan: str | Path | Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
    if isinstance(plan, Mapping):
        return Path("plan"), plan
    path = Path(plan)
    if path.suffix not in (".yaml", ".yml"):
        path = plan_folder() / f"{plan}.yaml"
        if not path.is_file():
            raise unknown("no plan named", str(plan), shipped_plans(), also=", or the path of a .yaml file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UseError("cannot be read as YAML", path=path, found=" ".join(str(error).split())) from None
    if not isinstance(content, Mapping):
        raise UseError("is not a plan", path=path, found=type(content).__name__, expected="title, steps, …")
    return path, content


def _explain(error: ValidationError, path: Path) -> UseError:
    first = problems_of(error)[0]
    if first.kind != "extra_forbidden":
        return misfit("", error, path=path)
    *place, key = first.where
    inside: dict[str, type[BaseModel]] = {"steps": StepEntry, "resources": Resources}
    model = next((inside[part] for part in reversed(place) if part in inside), PlanFile)
    known = [field.alias or name for name, field in model.model_fields.items()]
    return unknown("unknown key", key, known, f" in {'.'.join(place)}" if place else "", path=path)


def _override(file: PlanFile, overrides: dict[str, Any], path: Path) -> PlanFile:
    """Overrides take the place of fixed values and of factors alike."""
    content = file.model_dump(by_alias=True, exclude_none=True)
    paired: list[Any] = file.paired if isinstance(file.paired, list) else [file.paired]
    by_rows = {name for row in [*file.list_, *paired] for name in row}
    for key, value in overrides.items():
        head, _, rest = key.rpartition(".")
        if key == "seeds":
            content["seeds"] = value
        elif head == "resources":
            content["resources"][rest] = value
            for step in content["steps"]:
                step["resources"].pop(rest, None)
        elif head.endswith(".resources"):
            _step_of(content, head.removesuffix(".resources"), path)["resources"][rest] = value
        elif key in content["grid"]:
            content["grid"][key] = value if isinstance(value, list) else [value]
        elif key in by_rows:
            raise UseError(
                f"{key} is set row by row in this plan", path=path, fix="copy the plan and change its rows"
            )
        else:
            content["grid" if isinstance(value, list) else "parameters"][key] = value
            if isinstance(value, list):
                content["parameters"].pop(key, None)
            for step in content["steps"]:
                if head in ("", step["name"]):
                    step["parameters"].pop(rest, None)
    content["exclude"] = [rule for rule in content["exclude"] if _may_match(rule, content["grid"], overrides)]
    return _checked(content, path)


def _may_match(rule: Mapping[str, Any], grid: Mapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Whether an exclusion still has something to exclude after an override of one of its factors."""
    return all(
        any(value in grid[name] for value in (values if isinstance(values, list) else [values]))
        for name, values in rule.items()
        if name in overrides and name in grid
    )


def _step_of(content: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    names = [step["name"] for step in content["steps"]]
    one_of("no step", name, names, path=path)
    return content["steps"][names.index(name)]
