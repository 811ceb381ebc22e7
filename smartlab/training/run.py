"""A run folder: everything one pretraining left behind, readable while it is still going on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.core.config import Config, load_config
from smartlab.core.errors import DataError, UseError
from smartlab.core.settings import DataConfig
from smartlab.training import checkpoint

if TYPE_CHECKING:
    import pandas as pd

    from smartlab.models.encoder import AnyEncoder


class Run:
    """`runs/<name>/`: config.yaml, environment.json, metrics.csv, events.jsonl, checkpoints/, figures/.

    >>> run = sl.Run("runs/a")
    >>> run.history.plot("step", "loss_amip")
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise DataError("is not a run folder", path=path, expected="a config.yaml in it")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: step {self.step} of {self.config.train.steps})"

    @cached_property
    def config(self) -> Config:
        return load_config(self.path / "config.yaml")

    @property
    def facts(self) -> dict[str, Any]:
        """What it ran on (environment.json): versions, device, fingerprint of the data; empty before it began."""
        with _json_of(path := self.path / "environment.json"):
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def data(self) -> DataConfig:
        """The data it was trained on, by the places they had then: `evaluate` judges on these by default."""
        places = self.facts.get("places", {})
        if places is None:
            raise UseError(
                "was trained on an open store alone, whose manifest is not known",
                path=self.path,
                fix="say --data",
            )
        return self.config.data.model_copy(update=places)

    @property
    def history(self) -> pd.DataFrame:
        """One row per logged step, read afresh: also of a run that is going on."""
        import pandas as pd

        from smartlab.training.monitor import COLUMNS

        path = self.path / "metrics.csv"
        if not path.is_file() or not path.stat().st_size:
            return pd.DataFrame(columns=list(COLUMNS))
        try:
            table = pd.read_csv(path)
            return table.assign(step=table.step.astype(int))
        except (ValueError, AttributeError) as error:  # pandas' own errors of parsing are ValueErrors
            raise DataError(
                "is no table of steps",
                path=path,
                found=str(error).strip().splitlines()[0],
                fix="delete it; resuming the run starts it anew",
            ) from None

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.path / "events.jsonl"
        if not path.is_file():
            return []
        with _json_of(path):
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.endswith("}")]

    @property
    def step(self) -> int:
        """The newest checkpoint's step, 0 without one."""
        return max(checkpoint.steps(self.path), default=0)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    def method(self, step: int | None = None) -> Any:
        """All that was trained, decoders and heads too, as of a checkpoint: to look at reconstructions."""
        import torch

        from smartlab.training.families import family_of

        with torch.random.fork_rng():
            method = family_of(self.config).method(self.config)
        weights, _ = checkpoint.load(self._checkpoint(step))
        method.load_state_dict(weights)
        return method.eval().requires_grad_(False)

    def encoder(self, role: str = "teacher", step: int | None = None) -> AnyEncoder:
        """The encoder of a checkpoint, the newest by default; the student where there is no teacher."""
        import torch

        from smartlab.models.build import make_encoder

        if role not in checkpoint.ROLES:
            raise DataError(f"no role {role!r}", path=self.path, expected=" or ".join(checkpoint.ROLES))
        folder = self._checkpoint(step)
        if not self.config.teacher.enabled:
            role = "student"
        with torch.random.fork_rng():
            encoder = make_encoder(self.config)
        file = folder / f"{role}.safetensors"
        encoder.load_state_dict(checkpoint.finite(checkpoint.load_weights(file)[0], file))
        return encoder.eval().requires_grad_(False)

    def _checkpoint(self, step: int | None) -> Path:
        step = self.step if step is None else step
        folder = checkpoint.folder(self.path, step)
        if not folder.is_dir():
            raise DataError(
                "has no such checkpoint",
                path=self.path,
                found=f"step {step}",
                expected=f"one of {checkpoint.steps(self.path)}",
            )
        return folder


@contextmanager
def _json_of(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(
            "is damaged", path=path, found=error, fix="delete it; resuming the run writes on"
        ) from None
