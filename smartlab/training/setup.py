"""What a run is made of before it starts: the accelerator, the parameter groups, a check that learning works."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smartlab.config import Config
from smartlab.errors import UseError
from smartlab.methods.masked_distillation import Clock, MaskedDistillation

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: Config) -> Accelerator:
    """accelerate, configured: precision, and DDP or FSDP where there are several processes."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin

    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.train.precision]
    if precision == "fp16" and not torch.cuda.is_available():
        raise UseError("train.precision=fp16 needs a GPU", fix="use fp32 or bf16")
    plugin = FullyShardedDataParallelPlugin() if config.train.sharding == "fsdp" else None
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(mixed_precision=precision, kwargs_handlers=[ddp], fsdp_plugin=plugin)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in two groups: weight decay skips norms, biases and single tokens."""
    decays: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.dim() < 2 or name.endswith(
            ("bias", "cls", "position", "mask_token", "log_scale", "bias_table")
        )
        (spared if plain else decays).append(parameter)
    return [{"params": decays, "decays": True}, {"params": spared, "decays": False}]


def overfit_one_batch(config: Config, views: Tensor, steps: int = 200, lr: float = 2e-3) -> list[float]:
    """AMIP on one fixed batch with one fixed mask: a sanity check that must go to a small error.

    views: (B, 2, 1, D, H, W) windowed. Returns the reconstruction loss of every step.
    """
    torch.manual_seed(config.seed)
    method = MaskedDistillation(config)
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
        history.append(float(metrics["loss_amip"]))
    return history
