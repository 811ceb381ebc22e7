"""What a run is made of before it starts: the accelerator, the parameter groups, a check that learning works."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smartlab.core.clock import Clock
from smartlab.core.config import Config
from smartlab.core.errors import UseError
from smartlab.core.places import cache_folder
from smartlab.training.families import family_of

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: Config) -> Accelerator:
    """accelerate, configured: precision, and DDP where there are several processes."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.train.precision]
    if precision == "fp16" and not torch.cuda.is_available():
        raise UseError("train.precision=fp16 needs a GPU", fix="use fp32 or bf16")
    # without image and coarse loss nothing trains the query of [CLS]
    idle = config.semantic.enabled and not (config.loss.image or config.loss.coarse)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=idle)
    if not torch.distributed.is_initialized():
        # a second run in the same notebook may want another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    plain = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # said outright, because accelerate overlooks the processes of torchrun on a machine without a GPU
    return Accelerator(cpu=plain, mixed_precision=precision, kwargs_handlers=[ddp])


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next step instead of giving it back each time.

    On a CPU, fetching fresh pages for every large activation costs about a tenth of a step.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        trim, top_pad, map_above = -1, -2, -3  # names in malloc.h
        for option, size in ((map_above, 1 << 30), (trim, (1 << 31) - 1), (top_pad, 64 << 20)):
            libc.mallopt(option, size)


def compiled(model: nn.Module) -> nn.Module:
    """torch.compile(model), with its cache among smartlab's, so that later runs find what this one compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    return torch.compile(model)  # type: ignore[return-value]


def compile_report() -> dict[str, Any]:
    """Where compiled code is kept, and how many graphs of this process were found there, or had to be compiled."""
    from torch._dynamo.utils import counters

    def total(word: str) -> int:
        return sum(
            n
            for part in ("aot_autograd", "inductor")
            for name, n in counters[part].items()
            if name.endswith(word)
        )

    return {
        "cache": os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
        "found": total("cache_hit"),
        "compiled": total("cache_miss"),
    }


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters in two groups: weight decay skips norms, biases and single tokens."""
    decays: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    single = ("cls", "cls_token", "register_tokens", "mask_token", "position", "pos_embed")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.dim() < 2 or name.endswith(("bias", "log_scale", "bias_table", *single))
        (spared if plain else decays).append(parameter)
    return [{"params": decays, "decays": True}, {"params": spared, "decays": False}]


def overfit_one_batch(config: Config, views: Tensor, steps: int = 200, lr: float = 2e-3) -> list[float]:
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
