"""What changes over training, as pure functions of the global step.

Every schedule runs over *all* steps. (Published code has indexed the teacher momentum by the step
within the epoch, so that it restarted every epoch.)
"""

from __future__ import annotations

import math

from smartlab.core.settings import TeacherConfig, TrainConfig


def cosine(step: int, total: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at the last step, along half a cosine."""
    share = min(1.0, step / max(1, total - 1))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def learning_rate(step: int, train: TrainConfig, global_batch: int) -> float:
    """Linear warm-up, then cosine; by setting times the global batch."""
    peak = train.lr * (global_batch if train.lr_times == "batch" else 1)
    warm = round(train.warmup * train.steps)
    if step < warm:
        return peak * (step + 1) / warm
    return cosine(step - warm, train.steps - warm, peak, train.lr_end)


def weight_decay(step: int, train: TrainConfig) -> float:
    return cosine(step, train.steps, train.weight_decay, train.weight_decay_end)


def momentum(step: int, train: TrainConfig, teacher: TeacherConfig) -> float:
    return cosine(step, train.steps, teacher.momentum, teacher.momentum_end)
