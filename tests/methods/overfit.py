"""A sanity check: one batch with one mask can be learned by heart."""

from __future__ import annotations

import math

import torch

from smartlab.core.clock import Clock
from smartlab.training.families import family_of
from smartlab.training.setup import parameter_groups


def overfit_one_batch(config, views, steps=200, lr=2e-3):
    """The reconstruction of one fixed batch with one fixed mask: a sanity check that must go to a small error.

    views: windowed, as the method takes them. Returns the reconstruction loss of every step.
    """
    torch.manual_seed(config.seed)
    method = family_of(config).method(config)
    optimiser = torch.optim.AdamW(parameter_groups(method), lr=lr, weight_decay=0.0)
    history = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        generator = torch.Generator().manual_seed(config.seed)
        loss, metrics = method(views, Clock(0, steps, steps), generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(float(metrics.get("loss_amip", loss.detach())))
    return history
