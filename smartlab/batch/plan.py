"""Plans: which notebooks to run with which parameters, checked before anything runs.

A parameter is named bare (`data`: in every step that has it) or with its step (`probe.shots`).
The notebooks' own `parameters` cells say which there are and of what type. A text may take in the folder
of an earlier step's run, the plan's folder, and factors: "{pretrain}/run", "{plan}/my.yaml",
"mask.ratio={ratio}". How the file is written: `plan_file`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smartlab.batch.notebooks import Scalar, declared, locate, references
from smartlab.batch.plan_file import PlanFile, Resources, StepEntry, read_plan
from smartlab.core.errors import UseError, misfit, one_of, problems_of, unknown
from smartlab.notebook import NotebookParameters

Assignment = dict[str, Scalar]  # factor -> value
MOST_RUNS = 100_000


@dataclass(frozen=True)
class Step:
    """One notebook of the chain, with everything that does not vary."""

    name: str
    notebook: Path
    parameters: dict[str, Scalar]  # fixed values, and references such as "{pretrain}/run"
    known: dict[str, Any]  # parameter -> default in the notebook
    model: type[NotebookParameters]  # what they may be
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


def load_plan(plan: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Plan:
    """A plan from a shipped name, a YAML file or a mapping, with parameters, seeds or resources overridden.

    >>> load_plan("components", {"pretrain.steps": 100, "seeds": 1, "resources.gpus": 1})
    """
    path, file = read_plan(plan, overrides)
    steps = _steps(file, path)
    groups = _groups(file, path)
    factors = _factors(groups, steps, path)
    for step in steps.values():
        _check_fixed(step, {p for f in factors for s, p in _targets(f, factors[f]) if s == step.name}, path)
    _check_values(groups, factors, steps, path)
    combinations = _combine(groups, file.exclude, factors, path)
    _check_texts(steps, combinations, path)
    return Plan(path.stem, file.title, file.about.strip(), tuple(steps.values()), factors, combinations, path)


def _steps(file: PlanFile, path: Path) -> dict[str, Step]:
    written = list(file.steps)
    if file.notebook is not None:
        if written:
            raise UseError("has both `notebook` and `steps`", path=path, fix="keep one of them")
        name = re.sub(r"[^a-z0-9_-]+", "-", Path(file.notebook).stem.lower()).lstrip("_-")
        written = [StepEntry(name=name or "run", notebook=file.notebook)]
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


def _varied(file: PlanFile) -> list[str]:
    """The names of factors that a text may take in."""
    rows: list[Any] = [*file.list_]
    rows += file.paired if isinstance(file.paired, list) else [file.paired]
    names = [*file.grid, *(name for row in rows for name in row), *(["seed"] if file.seeds else [])]
    return [name for name in dict.fromkeys(names) if "." not in name]


def _make_step(
    step: StepEntry, file: PlanFile, before: Mapping[str, Step], varied: list[str], path: Path
) -> Step:
    notebook = locate(step.notebook, path)
    model = declared(notebook)
    known = {parameter: field.default for parameter, field in model.model_fields.items()}
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
    templates = {n: names for n, names in templates.items() if names}
    return Step(step.name, notebook, own, known, model, resources, after, templates)


def _owners(name: str, steps: Mapping[str, Step], path: Path) -> tuple[str, ...]:
    """The steps whose parameter a bare or dotted name sets."""
    head, _, bare = name.rpartition(".")
    if head:
        one_of(f"{name!r}: no step", head, steps, path=path)
    if bare == "out":
        raise UseError("`out` is set by the batch", path=path, fix="remove it from the plan")
    owners = tuple(
        s
        for s in ([head] if head else steps)
        if bare in steps[s].known or (not head and any(bare in used for used in steps[s].templates.values()))
    )
    if not owners:
        known = sorted({p for s in ([head] if head else steps) for p in steps[s].known if p != "out"})
        raise unknown("no parameter", bare, known, f" in {head or 'any step'}", path=path)
    return owners


def _groups(file: PlanFile, path: Path) -> list[list[Assignment]]:
    """Groups of alternatives; a combination takes one of each group."""
    groups: list[list[Assignment]] = [[{name: v} for v in values] for name, values in file.grid.items()]
    if file.list_:
        groups.append(file.list_)
    for pair in file.paired if isinstance(file.paired, list) else [file.paired]:
        lengths = {name: len(values) for name, values in pair.items()}
        if len(set(lengths.values())) > 1:
            raise UseError("paired factors differ in length", path=path, found=lengths)
        groups.append([dict(zip(pair, row, strict=True)) for row in zip(*pair.values(), strict=True)])
    if isinstance(file.seeds, int) and file.seeds > MOST_RUNS:
        raise UseError("too many seeds", path=path, found=file.seeds, expected=f"at most {MOST_RUNS}")
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
        _check_value(step, name, value, path)


def _check_values(
    groups: list[list[Assignment]], factors: dict[str, tuple[str, ...]], steps: dict[str, Step], path: Path
) -> None:
    for name, value in ((n, v) for group in groups for row in group for n, v in row.items()):
        for step, bare in _targets(name, factors[name]):
            _check_value(steps[step], bare, value, path)
            if references(value, ["plan", *steps], name, path) not in ([], ["plan"]):
                raise UseError(f"{name}: a varied value cannot refer to a step", path=path, found=repr(value))


def _check_value(step: Step, name: str, value: Scalar, path: Path) -> None:
    """A value must be one that the notebook itself would take; a text with references, once it is filled in."""
    if name not in step.known:  # a factor that only texts take in
        return
    try:
        step.model.model_validate({name: value})
    except ValidationError as error:
        first, default = problems_of(error)[0], step.known[name]
        if first.kind.endswith("_type"):
            fix = "write 1.0e-4, not 1e-4, in YAML" if isinstance(value, str) and "e-" in value else None
            raise UseError(
                f"{step.name}.{name} has the wrong type",
                path=path,
                found=repr(value),
                expected=f"{type(default).__name__}, such as {default!r}",
                fix=fix,
            ) from None
        if "{" not in str(value):
            raise misfit(f"{step.name}.", error, path=path) from None


def _check_texts(steps: Mapping[str, Step], combinations: Sequence[Assignment], path: Path) -> None:
    """Every text must find its words in every combination, and make of them what the notebook takes."""
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
            text, words = str(step.parameters[parameter]), {"plan": path.parent}
            if not set(references(text, [*step.after, "plan", *names], step.name, path)) & {*step.after}:
                for filled in {text.format_map(words | combination) for combination in combinations}:
                    _check_value(step, parameter, filled, path)


def _combine(
    groups: list[list[Assignment]], exclude: list[dict[str, Any]], factors: Mapping[str, Any], path: Path
) -> tuple[Assignment, ...]:
    from itertools import product

    if (count := prod(map(len, groups))) > MOST_RUNS:
        raise UseError("too many combinations", path=path, found=count, expected=f"at most {MOST_RUNS}")
    combinations = [{k: v for part in parts for k, v in part.items()} for parts in product(*groups)]
    for rule in exclude:
        for name in rule:
            one_of("exclude: no factor", name, factors, path=path)
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
