"""The little that every notebook shares: checked parameters in, data and encoder, one honest `result.json` out.

A notebook declares its parameters once, in the cell tagged `parameters`, each with its type:

    patients: AtLeast[2] = 12  # of the phantom
    ratio: Share = 0.7  # share of the units that a mask hides
    out: Folder = "runs/a"

and reads them in the next, `p = parameters(globals())`, where a wrong type or value stops, and so does a name
that the cell does not have: papermill would inject it without a word. A plan reads the same cell from the file
(`smartlab.batch.notebooks`) and refuses the same values before any kernel starts. Types are words, with whole
numbers in brackets, because these are what `papermill --help-notebook` shows; what else pydantic knows, such as
`Annotated[float, Field(gt=0)]` and `Literal["a", "b"]`, is checked as well.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

import smartlab
from smartlab.core.errors import DataError, UseError, problems_of, unknown
from smartlab.core.files import write_bytes, write_text
from smartlab.core.places import code_version, default_encoder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from smartlab.core.config import Config
    from smartlab.data.cohort.manifest import Manifest
    from smartlab.data.images.grid import Spacing
    from smartlab.data.store.store import Store
    from smartlab.evaluation.judge.result import Estimate
    from smartlab.models.encoder import AnyEncoder
    from smartlab.training.run import Run

_JUPYTER = {"In", "Out", "exit", "quit", "get_ipython", "open"}
_READ = "_smartlab_parameters"  # in a namespace: the names that were read from it before
_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))
SPACING = 2.0  # mm: that of `tiny`, and so of every notebook's phantom

# ---- what a parameter may be


class AtLeast:
    """A whole number from this one on: `AtLeast[2]`."""

    def __class_getitem__(cls, least: int) -> Any:
        return Annotated[int, Field(ge=least)]


class Between:
    """A whole number from the first to the second: `Between[8, 128]`."""

    def __class_getitem__(cls, ends: tuple[int, int]) -> Any:
        return Annotated[int, Field(ge=ends[0], le=ends[1])]


class Multiple:
    """A multiple of the first, from the second on: `Multiple[32, 64]`."""

    def __class_getitem__(cls, given: tuple[int, int]) -> Any:
        return Annotated[int, Field(multiple_of=given[0], ge=given[1])]


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
PixelSize = Annotated[float, Field(gt=0, le=1.5)]  # mm, of a mammogram
Words = Annotated[str, Field(min_length=1)]
Folder = Annotated[Path, Field(strict=False)]  # written as text, read as a path
Part = Literal["", "train", "val", "test"]  # a split of the manifest; empty: all
Folds = Literal["cross", "official", "folds", "auto"]  # how patients are dealt out
Starts = Annotated[str, Field(pattern=r"^(full|frozen|scratch)(, *(full|frozen|scratch))*$")]
Autoencoder = Literal["miram", "mae"]


class NotebookParameters(BaseModel):
    """Base of a notebook's parameters, with a field for each."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> type[Self]:
        """A model with these fields: name -> (type, default, or ... where a value must be given)."""
        with (
            warnings.catch_warnings()
        ):  # a parameter may have a name that pydantic has for itself, such as copy
            warnings.filterwarnings("ignore", message="Field name")
            try:
                return create_model("Parameters", __base__=cls, **fields)
            except PydanticUserError as error:
                raise UseError(
                    "a parameter has a type that cannot be checked",
                    found=str(error).splitlines()[0],
                    expected="str, bool, int, float, or a word of smartlab.notebook such as AtLeast[2]",
                ) from None

    @classmethod
    def read(cls, namespace: Mapping[str, Any]) -> Self:
        """Check the plain values of `namespace` (the notebook's globals) against the fields."""
        known = cls.model_fields
        given = {name: value for name, value in namespace.items() if name in known or _is_value(name, value)}
        for name, value in given.items():
            if name not in known:
                typed = f"{name}: {type(value).__name__} = {value!r}"
                fix = f"to have it, write its type in the tagged cell: {typed}"
                raise unknown("unknown notebook parameter", name, known, fix=fix)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = problems_of(error)[0]
            text = f"notebook parameter {first.place!r}: {first.why}"
            raise UseError(text, found=repr(first.value)) from None


def parameters(namespace: MutableMapping[str, Any]) -> Any:
    """What a notebook's tagged cell declares, checked: `p = parameters(globals())`, then `p.ratio`.

    Read again in the same kernel, after a change in that cell, it leaves alone what the notebook has made since.
    """
    before: tuple[str, ...] = namespace.get(_READ, ())
    types: dict[str, Any] = {
        name: (kind, ...)
        for name, kind in namespace.get("__annotations__", {}).items()
        if name in before or (name in namespace and _is_value(name, namespace[name]))
    }
    given = {name: namespace[name] for name in types} if before else namespace
    read = NotebookParameters.of(types).read(given)
    namespace[_READ] = tuple(types)
    return read


def _is_value(name: str, value: Any) -> bool:
    return not name.startswith("_") and name not in _JUPYTER and isinstance(value, _PLAIN)


# ---- data and encoder


class Cohort(NamedTuple):
    """The data of a notebook."""

    manifest: Manifest
    store: Store
    root: Path  # folder of the images


def phantom_folder(name: str, patients: int, seed: int = 0) -> Path:
    """Where the images of a phantom are kept for all notebooks."""
    from smartlab.data.phantoms.make import kept_in

    return kept_in(name, patients, seed)


def is_phantom(data: str) -> bool:
    """Whether a notebook works on synthetic data, so that its numbers say nothing about patients."""
    return data in ("phantom-ct", "phantom-mammo")


def described(data: str, root: str = "") -> Manifest:
    """What the data are, before anything is made or built: for parameters that are checked against it."""
    from smartlab.data.store.prepare import name_data

    return name_data(data, root or None, progress=False)[0]


def open_cohort(
    data: str,
    root: str = "",
    *,
    patients: int = 12,
    spacing: Spacing = SPACING,
    workers: int = 2,
    progress: bool = True,
) -> Cohort:
    """Manifest, store and image folder, making what is missing; all notebooks share it through the cache.

    data: a folder of scans, a manifest.json or its folder, or a shipped name, as `--data` takes them;
    root: folder of the images, if elsewhere.
    patients: of a phantom; a real cohort is taken whole.
    spacing: mm, as in the training of the encoder that is to see it.

    >>> cohort, store, root = open_cohort("phantom-ct")
    """
    from smartlab.core.settings import DataConfig
    from smartlab.data.store.index import read_header
    from smartlab.data.store.prepare import find_data, locate_images, prepare_store, store_place

    found, place = find_data(data, root or None, progress)
    drawn = found.source.kind == "phantom"
    if drawn and place is None:
        place = phantom_folder(found.name, patients, int(found.source.parameters["seed"]))
    config = DataConfig(
        manifest=data,
        root=None if place is None else str(place),
        spacing=spacing,
        phantom_cases=patients,
        workers=workers,
    )
    located = locate_images(config, progress, None if drawn else found)
    finished = read_header(store_place(*located, spacing)) is not None
    made, store = prepare_store(config, progress and not finished, located)
    return Cohort(made, store, located[1])


def open_encoder(source: str = "") -> tuple[AnyEncoder, str]:
    """The encoder a notebook works with, and one line that says which; "" is `default_encoder`.

    source: a run folder, an exported file, or any file that `sl.load_encoder` understands.
    """
    path = Path(source) if source else default_encoder()
    encoder = smartlab.load_encoder(path)
    if encoder.config.flat:
        raise DataError(
            "is an encoder of images, and this notebook works on CT",
            path=path,
            fix="give a run or file of an encoder of scans here; 08_mammography takes this one",
        )
    config = encoder.config
    return encoder, (
        f"{path.name}: {config.method.preset}, masks {config.mask.strategy}, {config.train.steps} steps, "
        f"units of {encoder.stride} voxels"
    )


def train(config: Config, out: str | Path, *, resume: bool = True, processes: int = 1) -> Run:
    """Pretrain from a notebook: in this kernel, or on several GPUs through accelerate's `notebook_launcher`.

    Stopping the cell (■) saves after the step in hand; running it again goes on from there. With
    several processes the kernel itself only watches the run folder.
    """
    import torch

    if processes == 1:
        return smartlab.pretrain(config, out, resume=resume)
    if processes > torch.cuda.device_count():
        raise UseError(
            f"processes={processes} needs as many GPUs",
            found=f"{torch.cuda.device_count()} GPUs",
            fix="set processes=1, or start it elsewhere with accelerate and give that run's folder as attach",
        )
    from smartlab.training.follow import launch

    return launch(config, Path(out), resume, processes)


# ---- numbers


def hidden_shares(
    masks: Mapping[str, Tensor], shares: Mapping[str, Tensor], patients: np.ndarray
) -> dict[str, dict[str, Estimate]]:
    """Strategy -> region -> the share of it that is hidden: mean over the crops that show it, over patients.

    masks: strategy -> (B, N), how often a unit is hidden;  shares: region -> (B, N), see `unit_shares`.
    """
    from smartlab.evaluation.judge.result import Estimate
    from smartlab.evaluation.judge.stats import t_interval
    from smartlab.masking import hidden_share

    def mean(mask: Tensor, share: Tensor) -> Estimate:
        there = share.sum(1).nonzero().flatten().tolist()
        each = [float(hidden_share(mask[i : i + 1], share[i : i + 1])) for i in there]
        if len({*patients[there]}) == 1:  # one patient has no interval
            return Estimate(sum(each) / len(each), n=1)
        return t_interval(each, patients[there])

    return {
        name: {region: mean(mask, share) for region, share in shares.items()} for name, mask in masks.items()
    }


# ---- files


def keep_copy(picture: Path, to: Path) -> Path:
    """Copy a picture beside the notebook's own, whole or not at all."""
    write_bytes(to, picture.read_bytes())
    return to


def finish(
    out: str | Path,
    *,
    step: str,
    parameters: NotebookParameters,
    metrics: Mapping[str, Any],
    headline: str,
    figures: Sequence[str | Path] = (),
    captions: Sequence[str] = (),
    data: str = "",
    smoke: bool = True,
) -> dict[str, Any]:
    """Write `out/result.json`: what was run on what, and what came out.

    metrics:  name -> number, or {"value", "low", "high", "n"} where there is an interval.
    headline: one line for the results table.
    captions: what to see in each figure, in the same order.
    data:     fingerprint of the data the numbers were computed on.
    smoke:    True for a small demonstration run, whose numbers mean nothing beyond "it works".
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shown = [os.path.relpath(figure, out) for figure in figures]
    result = {
        "step": step,
        "headline": headline,
        "smoke": smoke,
        "metrics": {name: _plain(value) for name, value in metrics.items()},
        "parameters": parameters.model_dump(mode="json"),
        "data": data,
        "code": code_version(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "figures": shown,
        "captions": dict(zip(shown, captions, strict=False)),
    }
    write_text(out / "result.json", json.dumps(result, indent=1))
    return result


def _plain(value: Any) -> Any:
    """Numbers, text, or an estimate with its interval, as JSON knows them; not-a-number becomes null."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
