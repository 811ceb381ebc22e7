"""What a model makes of a scan around one voxel, and what a choice hides of it: the explorer without its controls."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smartlab.masking import head_diversity, informativeness, make_mask
from smartlab.viewers.controls import Choice
from smartlab.viewers.subject import Model, Subject, View

TOGETHER = 10  # units a side up to which attention received is looked at with the other: all pairs of units


class Looking:
    """The model looks at a view once per place and draw of noise; what is hidden follows from that look."""

    def __init__(self, subject: Subject, model: Model, side: int) -> None:
        self.subject, self.model, self.side, self.center = subject, model, side, subject.center
        window = model.config.data.window
        self._view = lru_cache(8)(lambda center: subject.view(center, side, model.stride, window))
        self._look = lru_cache(256)(lambda center, *how: model.look(self._view(center).input, *how))
        self._told = lru_cache(256)(self._tell_of)

    @property
    def view(self) -> View:
        """The crop: image, affine, labels, and which part of each unit is body, organ or lesion."""
        return self._view(tuple(self.center.tolist()))

    def look(self, choice: Choice) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What guides by a choice: attention (1, heads, N), received (1, N), and the importance that is made of them,
        (1, heads, N) whose mean counts, or (1, N). None without semantic attention."""
        noise = (choice.dropout, choice.draw) if choice.guide == "noisy" else (0.0, 0)
        by_received = choice.importance == "received"
        few = self.model.receives and self.view.input.shape[2] // self.model.stride <= TOGETHER
        attention, received, mean = self._look(tuple(self.center.tolist()), *noise, by_received or few)
        if attention is None or choice.importance == "mean":
            return attention, received, mean
        one = received if by_received else attention[:, int(choice.importance[5:]) - 1]
        return attention, received, one

    def hide(self, choice: Choice) -> Tensor:
        """(1, N) bool: what the choice's strategy hides, from a generator of its own with the choice's seed."""
        grid = self.model.units(self.view)
        return make_mask(
            choice.strategy,
            self.look(choice)[2] if choice.strategy.startswith("attention") else None,
            choice.ratio,
            (1,) * (3 - len(grid)) + grid,  # type: ignore[arg-type]
            generator=torch.Generator().manual_seed(choice.seed),
            batch=1,
            **choice.drawing(self.model.config.mask),
        )

    def on_grid(self, units: Tensor) -> np.ndarray:
        """(1, …, N) -> (…, d, h, w), or (…, h, w) of a mammogram."""
        return units.unflatten(-1, self.model.units(self.view))[0].numpy()

    def seen(self, choice: Choice) -> np.ndarray | None:
        """Attention by a choice, (heads, d, h, w), whose mean guides masks or of which one head does; of received attention
        the same for every head."""
        attention, received, one = self.look(choice)
        if choice.importance == "mean":
            attention = one
        if attention is not None and received is not None and choice.importance == "received":
            attention = received[:, None].expand_as(attention)
        return None if attention is None else self.on_grid(attention)

    def told(self, choice: Choice) -> dict[str, float]:
        """How informative the look that guides by a choice is, and how the heads differ; empty without attention."""
        looks = {name: getattr(choice, name) for name in ("guide", "dropout", "draw", "importance")}
        return self._told(tuple(self.center.tolist()), Choice(**looks))

    def _tell_of(self, center: tuple[int, ...], choice: Choice) -> dict[str, float]:
        attention, _, importance = self.look(choice)
        if attention is None or importance is None:
            return {}
        apart = head_diversity(attention)
        return {
            "informativeness": float(informativeness(importance)),
            "head_diversity": float(apart["cosine"]),
            "head_divergence": float(apart["jensen_shannon"]),
        }

    def facts(self, choice: Choice) -> list[str]:
        """`told` in words."""
        told: Any = self.told(choice)
        if not told:
            return []
        return [
            f"attention informativeness {told['informativeness']:.3f} (0 even, 1 a single unit)",
            f"heads differ by {told['head_diversity']:.2f} (cosine), {told['head_divergence']:.2f} (Jensen–Shannon)",
        ]
