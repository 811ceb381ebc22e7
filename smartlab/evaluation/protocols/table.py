"""What a protocol is: data, in `dagman.yaml`, whose keys are told there."""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from smartlab.evaluation.finetune.settings import Settings
from smartlab.evaluation.task import find

OF_THE_CALL = {"beside", "label", "root", "seed", "progress", "resume", "fractions"}  # given by the protocol


class Paper(NamedTuple):
    """Figures of the paper for one metric, and where it gives them."""

    smit: float
    dagman: float
    where: str


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Entry):
    """One call of `evaluate`, and what the paper has for its metrics."""

    name: str
    task: str
    settings: dict[str, Any]
    paper: dict[str, Paper]
    epochs: int | None = None
    share: float = 1.0

    @property
    def trains(self) -> bool:
        return find(self.task).trains

    @cached_property
    def known(self) -> set[str]:
        """Settings that its task takes here."""
        return (find(self.task).settings.keys() - OF_THE_CALL) | (
            set(Settings.model_fields) if self.trains else set()
        )

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-").replace("%", "pct")

    def untrained(self, metric: str) -> str:
        """The metric of the same architecture without pretraining, learned from as much."""
        if self.task == "clusters":
            return f"random {metric}"
        share = "" if self.task == "classify" and self.share == 1 else f", {100 * self.share:g}%"
        return f"{metric} (scratch{share})" if self.trains else f"random encoder/{metric}"


class Protocol(_Entry):
    """Which cases, which parts, and what is unlike the paper."""

    parts: list[Part]
    unlike: list[str]
    manifest: str | None = None  # None: the paper's data are not public
    label: str | None = None
    kind: Literal["binary", "multiclass", "masks"] = "binary"
    test: float | None = None
    folds: int | None = None
    include: str | None = None
    cases: int | None = None  # of a manifest that lists its own only once fetched
    data: dict[str, Any] = {}


@cache
def protocols() -> dict[str, Protocol]:
    """Every protocol by name."""
    text = Path(__file__).with_name("dagman.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, Protocol]).validate_python(yaml.safe_load(text))
