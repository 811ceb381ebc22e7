"""What a run is made of before it starts: the accelerator, compiled code, the parameter groups."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smartlab.core.errors import UseError
from smartlab.core.places import cache_folder
from smartlab.training.requests import on_cpu, ranks

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(precision: str, *, idle: bool, device: str | None = None) -> Accelerator:
    """accelerate, configured: precision, and DDP where there are several processes.

    idle:   whether a step may leave parameters without a gradient.
    device: of a single process; None: the GPU where there is one.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, patch_environment

    if precision == "fp16" and not torch.cuda.is_available():
        raise UseError("train.precision=fp16 needs a GPU", fix="use fp32 or bf16")
    if device not in (None, "cpu") and ranks()[1] > 1:
        raise UseError(
            f"device={device} is for one process", fix="leave it out: each process takes its own GPU"
        )
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=idle)
    if not torch.distributed.is_initialized():
        # a second run in the same notebook may want another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    plain = device == "cpu" or (device is None and on_cpu())
    asked = {} if plain or device is None else {"ACCELERATE_TORCH_DEVICE": device}
    with patch_environment(**asked):
        return Accelerator(
            cpu=plain, mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=[ddp]
        )


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
