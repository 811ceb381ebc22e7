"""Where training stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where training stands; everything that changes over time follows from it."""

    step: int
    total: int
    steps_per_epoch: int
    rank: int = 0
    world: int = 1

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch
