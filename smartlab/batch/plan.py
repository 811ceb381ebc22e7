"""Plan files: which notebooks to run with which parameters, checked before anything runs.

A parameter is named bare (`manifest`: in every step that has it) or with its step (`probe.shots`).
The notebooks' own `parameters` cells say which there are and of what type. A text may take in the folder
of an earlier step's run, the plan's folder, and factors: "{pretrain}/run", "{plan}/my.yaml",
"mask.ratio={ratio}".

    title: Does masking by attention help?
    steps:
      - {name: pretrain, notebook: 02_pretrain}
      - {name: probe, notebook: 04_linear_probe, parameters: {run: "{pretrain}/run"}}
    parameters: {steps: 2000}                                     # the same in every run
    grid: {strategy: [random, attention_high]}                    # every combination
    paired: {manifest: [a.json, b.json], root: [data/a, data/b]}  # values that go together
    list: [{batch: 2}, {batch: 4, lr: 0.001}]                     # one set of values after another
    seeds: [0, 1, 2]                                              # or a number of seeds
    exclude: [{strategy: random, batch: 4}]
    resources: {cores: 1, gpus: 0, memory: 4, minutes: 30}        # of each run; minutes are its limit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smartlab.batch.notebooks import Scalar, locate, near, notebook_parameters, references
from smartlab.errors import UseError

Assignment = dict[str, Scalar]  # factor -> value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Resources(_Strict):
    """What one run needs. Runs are placed by all of these; only the time is enforced."""

    cores: int = Field(1, ge=1)  # also the number of threads a run computes with
    gpus: int = Field(0, ge=0)
    memory: float = Field(2.0, gt=0)  # GB
    minutes: float = Field(60.0, gt=0)  # limit: a run that takes longer is ended and counts as failed


class _SomeResources(_Strict):
    cores: int | None = None
    gpus: int | None = None
    memory: float | None = None
    minutes: float | None = None


class _Step(_Strict):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    notebook: str
    parameters: dict[str, Scalar] = {}
    resources: _SomeResources = _SomeResources()


class _File(_Strict):
    """The file as written."""

    title: str
    about: str = ""
    notebook: str | None = None
    steps: list[_Step] = []
    parameters: dict[str, Scalar] = {}
    grid: dict[str, list[Scalar]] = {}
    list_: list[dict[str, Scalar]] = Field([], alias="list")
    paired: dict[str, list[Scalar]] | list[dict[str, list[Scalar]]] = []
    seeds: int | list[int] = []
    exclude: list[dict[str, Any]] = []
    resources: Resources = Resources()


@dataclass(frozen=True)
class Step:
    """One notebook of the chain, with everything that does not vary."""

    name: str
    notebook: Path
    parameters: dict[str, Scalar]  # fixed values, and references such as "{pretrain}/run"
    known: dict[str, Any]  # parameter -> default in the notebook
    resources: Resources
    after: tuple[str, ...]  # names of the steps it refers to
    templates: dict[str, tuple[str, ...]]  # parameter -> the factors that its text takes in


@dataclass(frozen=True)
class Plan:
    name: str
    title: str
    about: str
    steps: tuple[Step, ...]
    factors: dict[str, tuple[str, ...]]  # factor -> the steps whose parameter it sets
    combinations: tuple[Assignment, ...]
    path: Path

    def targets(self, factor: str) -> list[tuple[str, str]]:
        """The (step, parameter) pairs that a factor sets."""
        return [(step, factor.rpartition(".")[2]) for step in self.factors[factor]]


def plan_folder() -> Path:
    from smartlab.demo import notebook_folder

    return notebook_folder() / "plans"


def shipped_plans() -> list[str]:
    return sorted(path.stem for path in plan_folder().glob("*.yaml"))


def load_plan(plan: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Plan:
    """A plan from a shipped name, a YAML file or a mapping, with parameters, seeds or resources overridden.

    >>> load_plan("components", {"pretrain.steps": 100, "seeds": 1, "resources.gpus": 1})
    """
    path, content = _read(plan)
    try:
        file = _File.model_validate(content)
    except ValidationError as error:
        raise UseError(_explain(error), path=path) from None
    file = _override(file, dict(overrides or {}), path)
    steps = _steps(file, path)
    groups = _groups(file, path)
    factors = _factors(groups, steps, path)
    for step in steps.values():
        _check_fixed(step, {p for f in factors for s, p in _targets(f, factors[f]) if s == step.name}, path)
    _check_values(groups, factors, steps, path)
    combinations = _combine(groups, file.exclude, factors, path)
    _check_texts(steps, combinations, path)
    return Plan(path.stem, file.title, file.about.strip(), tuple(steps.values()), factors, combinations, path)


def _read(plan: str | Path | Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
    if isinstance(plan, Mapping):
        return Path("plan"), plan
    path = Path(plan)
    if path.suffix not in (".yaml", ".yml"):
        path = plan_folder() / f"{plan}.yaml"
        if not path.is_file():
            known = shipped_plans()
            raise UseError(
                f"no plan named {str(plan)!r}",
                expected=f"one of {', '.join(known)}, or the path of a .yaml file",
                fix=near(str(plan), known),
            )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UseError("cannot be read as YAML", path=path, found=" ".join(str(error).split())) from None
    if not isinstance(content, Mapping):
        raise UseError("is not a plan", path=path, found=type(content).__name__, expected="title, steps, …")
    return path, content


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *_, key = first["loc"]
        inside: dict[str, type[BaseModel]] = {"steps": _Step, "resources": Resources}
        model: type[BaseModel] = next(
            (inside[str(p)] for p in reversed(first["loc"][:-1]) if str(p) in inside), _File
        )
        known = [field.alias or name for name, field in model.model_fields.items()]
        hint = near(str(key), known)
        return f"unknown key {place!r} (expected one of {', '.join(known)})" + (f"; {hint}" if hint else "")
    return f"{place}: {first['msg']} (found {first['input']!r})"


def _override(file: _File, overrides: dict[str, Any], path: Path) -> _File:
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
    try:
        return _File.model_validate(content)
    except ValidationError as error:
        raise UseError(_explain(error), path=path) from None


def _may_match(rule: Mapping[str, Any], grid: Mapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Whether an exclusion still has something to exclude after an override of one of its factors."""
    return all(
        any(value in grid[name] for value in (values if isinstance(values, list) else [values]))
        for name, values in rule.items()
        if name in overrides and name in grid
    )


def _step_of(content: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    names = [step["name"] for step in content["steps"]]
    if name not in names:
        raise UseError(f"no step {name!r}", path=path, expected=", ".join(names), fix=near(name, names))
    return content["steps"][names.index(name)]


def _steps(file: _File, path: Path) -> dict[str, Step]:
    written = list(file.steps)
    if file.notebook is not None:
        if written:
            raise UseError("has both `notebook` and `steps`", path=path, fix="keep one of them")
        written = [_Step(name=Path(file.notebook).stem.lower(), notebook=file.notebook)]
    if not written:
        raise UseError("runs nothing", path=path, expected="`notebook` or `steps`")
    if len({step.name for step in written}) < len(written):
        raise UseError("two steps have one name", path=path, found=", ".join(s.name for s in written))
    varied = _varied(file)
    steps: dict[str, Step] = {}
    for step in written:
        steps[step.name] = _make_step(step, file, steps, varied, path)
    for name in file.parameters:  # a name no step knows must not pass silently
        _owners(name, steps, path)
    return steps


def _varied(file: _File) -> list[str]:
    """The names of factors that a text may take in."""
    rows: list[Any] = [*file.list_]
    rows += file.paired if isinstance(file.paired, list) else [file.paired]
    names = [*file.grid, *(name for row in rows for name in row), *(["seed"] if file.seeds else [])]
    return [name for name in dict.fromkeys(names) if "." not in name]


def _make_step(step: _Step, file: _File, before: Mapping[str, Step], varied: list[str], path: Path) -> Step:
    notebook = locate(step.notebook, path)
    known = notebook_parameters(notebook)
    if "out" not in known:
        raise UseError("has no parameter `out`", path=notebook, expected="the folder for result.json")
    own = {}
    for name, value in file.parameters.items():
        head, _, bare = name.rpartition(".")
        if head == step.name or (not head and bare in known and bare not in step.parameters):
            own[bare] = value
    own |= {n: v for n, v in step.parameters.items() if f"{step.name}.{n}" not in file.parameters}
    uses = {n: references(v, [*before, "plan", *varied], step.name, path) for n, v in own.items()}
    after = tuple(dict.fromkeys(name for names in uses.values() for name in names if name in before))
    templates = {n: tuple(name for name in names if name in varied) for n, names in uses.items()}
    needs = file.resources.model_copy(update=step.resources.model_dump(exclude_none=True))
    resources = Resources.model_validate(needs.model_dump())
    return Step(step.name, notebook, own, known, resources, after, {n: t for n, t in templates.items() if t})


def _owners(name: str, steps: Mapping[str, Step], path: Path) -> tuple[str, ...]:
    """The steps whose parameter a bare or dotted name sets."""
    head, _, bare = name.rpartition(".")
    if head and head not in steps:
        raise UseError(
            f"{name!r}: no step {head!r}", path=path, expected=", ".join(steps), fix=near(head, steps)
        )
    if bare == "out":
        raise UseError("`out` is set by the batch", path=path, fix="remove it from the plan")
    owners = tuple(
        s
        for s in ([head] if head else steps)
        if bare in steps[s].known or (not head and any(bare in used for used in steps[s].templates.values()))
    )
    if not owners:
        known = sorted({p for s in ([head] if head else steps) for p in steps[s].known if p != "out"})
        raise UseError(
            f"no parameter {bare!r} in {head or 'any step'}",
            path=path,
            expected=f"one of {', '.join(known)}",
            fix=near(bare, known),
        )
    return owners


def _groups(file: _File, path: Path) -> list[list[Assignment]]:
    """Groups of alternatives; a combination takes one of each group."""
    groups: list[list[Assignment]] = [[{name: v} for v in values] for name, values in file.grid.items()]
    if file.list_:
        groups.append(file.list_)
    for pair in file.paired if isinstance(file.paired, list) else [file.paired]:
        lengths = {name: len(values) for name, values in pair.items()}
        if len(set(lengths.values())) > 1:
            raise UseError("paired factors differ in length", path=path, found=lengths)
        groups.append([dict(zip(pair, row, strict=True)) for row in zip(*pair.values(), strict=True)])
    if file.seeds:
        seeds = list(range(file.seeds)) if isinstance(file.seeds, int) else file.seeds
        groups.append([{"seed": seed} for seed in seeds])
    if any(not group or not all(group) for group in groups):
        raise UseError("a factor has no values", path=path, fix="give at least one, or remove the factor")
    return groups


def _factors(
    groups: list[list[Assignment]], steps: dict[str, Step], path: Path
) -> dict[str, tuple[str, ...]]:
    factors: dict[str, tuple[str, ...]] = {}
    taken: dict[tuple[str, str], str] = {}
    for group in groups:
        for name in dict.fromkeys(name for row in group for name in row):
            if name in factors:
                raise UseError(f"factor {name!r} is varied twice", path=path)
            factors[name] = _owners(name, steps, path)
            for target in _targets(name, factors[name]):
                if target in taken:
                    raise UseError(
                        f"{'.'.join(target)} is varied by {taken[target]!r} and {name!r}", path=path
                    )
                taken[target] = name
    return factors


def _targets(factor: str, steps: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(step, factor.rpartition(".")[2]) for step in steps]


def _check_fixed(step: Step, varied: set[str], path: Path) -> None:
    for name, value in step.parameters.items():
        _owners(f"{step.name}.{name}", {step.name: step}, path)
        if name in varied:
            raise UseError(f"{step.name}.{name} is both fixed and varied", path=path, fix="keep one")
        _check_type(step, name, value, path)


def _check_values(
    groups: list[list[Assignment]], factors: dict[str, tuple[str, ...]], steps: dict[str, Step], path: Path
) -> None:
    for name, value in ((n, v) for group in groups for row in group for n, v in row.items()):
        for step, bare in _targets(name, factors[name]):
            _check_type(steps[step], bare, value, path)
            if references(value, ["plan", *steps], name, path) not in ([], ["plan"]):
                raise UseError(f"{name}: a varied value cannot refer to a step", path=path, found=repr(value))


def _check_type(step: Step, name: str, value: Scalar, path: Path) -> None:
    """A value must be of the type of the notebook's default; a whole number may stand for a fraction."""
    if name not in step.known:  # a factor that only texts take in
        return
    default = step.known[name]
    fits = type(value) is type(default) or (type(default) is float and type(value) is int)
    if default is not None and not fits:
        fix = "write 1.0e-4, not 1e-4, in YAML" if isinstance(value, str) and "e-" in value else None
        expected = f"{type(default).__name__}, such as {default!r}"
        raise UseError(
            f"{step.name}.{name} has the wrong type", path=path, found=repr(value), expected=expected, fix=fix
        )


def _check_texts(steps: Mapping[str, Step], combinations: Sequence[Assignment], path: Path) -> None:
    """Every text must find its words in every combination."""
    for step in steps.values():
        for parameter, names in step.templates.items():
            for combination in combinations:
                if lacking := [name for name in names if name not in combination]:
                    raise UseError(
                        f"{step.name}.{parameter} takes in {lacking[0]!r}, which some combinations lack",
                        path=path,
                        found=combination,
                        fix=f"give {lacking[0]} in every row",
                    )


def _combine(
    groups: list[list[Assignment]], exclude: list[dict[str, Any]], factors: Mapping[str, Any], path: Path
) -> tuple[Assignment, ...]:
    from itertools import product

    combinations = [{k: v for part in parts for k, v in part.items()} for parts in product(*groups)]
    for rule in exclude:
        for name in rule:
            if name not in factors:
                raise UseError(
                    f"exclude: no factor {name!r}",
                    path=path,
                    expected=", ".join(factors),
                    fix=near(name, factors),
                )
        kept = [c for c in combinations if not _matches(c, rule)]
        if len(kept) == len(combinations):
            raise UseError("an exclusion excludes nothing", path=path, found=rule, fix="check its values")
        combinations = kept
    if not combinations:
        raise UseError("every combination is excluded", path=path)
    return tuple(combinations)


def _matches(combination: Assignment, rule: Mapping[str, Any]) -> bool:
    return all(
        name in combination and combination[name] in (values if isinstance(values, list) else [values])
        for name, values in rule.items()
    )
