"""The runs of a plan, each named by a digest of everything that goes into it.

The digest covers the notebook, its parameters, smartlab's source, the data, and the same of every run
it builds on. So a pretraining that three evaluations need is one run, in whichever plan it appears,
and a run that is done is never done again.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import smartlab
from smartlab.batch.plan import Assignment, Plan, Step
from smartlab.batch.plan_file import Resources
from smartlab.batch.records import digest
from smartlab.data.cohort.manifest import shipped_manifests

NAME_LENGTH = 100  # of the readable part of a folder's name
FILES_LOOKED_AT = 10_000  # in a folder of data that is not described by a manifest


@dataclass
class BatchRun:
    """One notebook with one set of parameters."""

    step: str
    name: str  # readable, and unique by the key at its end
    key: str
    identity: str  # like the key, but without smartlab's source and the notebook's text
    notebook: Path
    parameters: dict[str, Any]  # with references such as "{pretrain}/run" not yet resolved
    settings: dict[str, Any]  # with the notebook's defaults, and factors instead of texts made of them
    upstream: dict[str, BatchRun]
    resources: Resources
    data: str
    order: int  # of the first combination that needs it
    combinations: list[int] = field(default_factory=list)


def expand(plan: Plan, *, code: str | None = None) -> list[BatchRun]:
    """Every run once, those that others build on first; `code` replaces the digest of smartlab's source."""
    code = code or code_digest()
    for remembered in (_cohort, _contents):  # for the runs of one plan, not for a whole session in a notebook
        remembered.cache_clear()
    runs: dict[str, BatchRun] = {}
    notebooks = {step.name: _digest(step.notebook.read_text(encoding="utf-8")) for step in plan.steps}
    for number, combination in enumerate(plan.combinations):
        chain: dict[str, BatchRun] = {}
        for step in plan.steps:
            run = _run(plan, step, combination, chain, notebooks[step.name], code, number)
            chain[step.name] = runs.setdefault(run.key, run)
            chain[step.name].combinations.append(number)
    return list(runs.values())


def _run(
    plan: Plan,
    step: Step,
    combination: Assignment,
    chain: Mapping[str, BatchRun],
    notebook: str,
    code: str,
    number: int,
) -> BatchRun:
    factors: Assignment = {}
    for factor, value in combination.items():
        factors |= {name: value for owner, name in plan.targets(factor) if owner == step.name}
    words = {"plan": str(plan.path.resolve().parent), **combination}
    parameters = {n: fill(v, words) for n, v in step.parameters.items()}
    parameters |= {n: fill(v, words) for n, v in factors.items() if n in step.known}
    upstream = {name: chain[name] for name in step.after}
    full = {k: v for k, v in step.known.items() if k != "out"} | parameters
    data = data_digest(full)
    # what the parameters come to, not how they are written: a default written out is the same run
    facts = [step.notebook.stem, full, data]
    key = _digest([*facts, notebook, code, {name: run.key for name, run in upstream.items()}])
    identity = _digest([*facts, {name: run.identity for name, run in upstream.items()}])
    lineage = _lineage(plan, step.name)
    tells = {f: v for f, v in combination.items() if lineage & set(plan.factors[f])}
    return BatchRun(
        step=step.name,
        name=f"{_readable(tells)}{key}",
        key=key,
        identity=identity,
        notebook=step.notebook,
        parameters=parameters,
        settings={k: v for k, v in full.items() if k not in step.templates} | factors,
        upstream=upstream,
        resources=step.resources,
        data=data,
        order=number,
    )


def fill(value: Any, words: Mapping[str, Any]) -> Any:
    """A text with these words filled in; references to steps stay for `resolve`."""
    if not isinstance(value, str) or "{" not in value:
        return value
    parts = []
    for text, name, _, _ in string.Formatter().parse(value):
        parts.append(text.replace("{", "{{").replace("}", "}}"))
        parts += [] if name is None else [str(words[name]) if name in words else f"{{{name}}}"]
    return "".join(parts)


def resolve(value: Any, folders: Mapping[str, Path]) -> Any:
    """A filled-in text with `{step}` replaced by the folder of that step's run."""
    if isinstance(value, str) and "{" in value:
        return value.format(**{name: str(folder) for name, folder in folders.items()})
    return value


def _lineage(plan: Plan, name: str) -> set[str]:
    """A step and all it builds on."""
    step = next(s for s in plan.steps if s.name == name)
    return {name}.union(*(_lineage(plan, before) for before in step.after))


def _readable(values: Assignment) -> str:
    words = [f"{name.rpartition('.')[2]}-{value}" for name, value in values.items()]
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words))[:NAME_LENGTH]
    return f"{text}-" if text else ""


def _digest(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return digest(text.encode())


def code_digest() -> str:
    """A digest of smartlab's source and presets as they are on the disk now."""
    package = Path(smartlab.__file__).parent
    total = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".yaml")):
        total.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def data_digest(parameters: Mapping[str, Any]) -> str:
    """A digest of the data that parameters name: the manifest, sizes and times of the images, other files and folders.

    Nothing inside the images is read. A phantom follows from its manifest, and stores from their images.
    """
    root, parts, told = parameters.get("root"), [], {"store"}
    for name in ("data", "manifest"):  # as our notebooks call it, and as others may
        value = parameters.get(name)
        if isinstance(value, str) and _names_a_cohort(value):
            parts.append(_cohort(value, root if isinstance(root, str) else ""))
            told |= {name, "root"}
    for name, value in sorted(parameters.items()):
        if name in told or not isinstance(value, str):
            continue
        if "/" in value and "{" not in value and Path(value).exists():
            parts.append(f"{name}:{_contents(Path(value))}")
    return _digest(parts) if parts else ""


def _names_a_cohort(value: str) -> bool:
    return value in shipped_manifests() or value.endswith(".json") or (value != "" and Path(value).is_dir())


@lru_cache(maxsize=256)
def _cohort(manifest: str, root: str) -> str:
    from smartlab.data.store.current import cohort_state
    from smartlab.data.store.prepare import find_data, name_data

    named, place = name_data(manifest, root or None, progress=False)
    if named.source.kind == "phantom" or place is None:
        return _digest(named.model_dump_json())
    full = find_data(named, place)[0]
    if (state := cohort_state(full, place)) is not None:
        return _digest(state)
    # found by what is in their headers
    found = {group.key: _contents(group.cases[0].locate(place)) for group in full.images()}
    return _digest([named.model_dump_json(), found])


@lru_cache(maxsize=256)
def _contents(path: Path) -> str:
    """A small file by its text, anything else by the names, sizes and times of its files."""
    if path.is_file() and path.stat().st_size < 2**24:
        return digest(path.read_bytes())
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())[:FILES_LOOKED_AT]
    seen = [(str(p.relative_to(path)), p.stat()) for p in files]
    return _digest([[name, facts.st_size, facts.st_mtime_ns] for name, facts in seen])
