"""Parameters, gradients and optimiser state spread over the processes (FSDP), for `train.sharding=fsdp`.

Every block of the transformer is gathered when it is used and let go afterwards; each process keeps, and
optimises, its share. Checkpoints hold whole tensors, the same as without sharding: a run can move between
one process, DDP and FSDP. torch's part of it is imported where it is needed: it takes a second of every
start, and a run of one process has none of its tensors.

Zhao et al., "PyTorch FSDP" (2023).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from smartlab.models.swin import Block
from smartlab.models.vit import ViTBlock

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard(model: nn.Module) -> FSDPModule:
    """Spread the parameters of `model` over all processes, in place."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, Block | ViTBlock):
            fully_shard(module)
    return fully_shard(model)


def gathered(tree: Any) -> Any:
    """The same nested structure with whole tensors. All processes must call this together."""
    if "torch.distributed.tensor" not in sys.modules:
        return tree  # nothing can have been spread
    from torch.distributed.tensor import DTensor

    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def scattered(state: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """An optimiser's state dict of whole tensors, each cut as the parameter it belongs to."""
    if "torch.distributed.tensor" not in sys.modules:
        return state
    from torch.distributed.tensor import DTensor, distribute_tensor

    shards = dict(enumerate(parameters))

    def cut(index: int, value: Any) -> Any:
        like = shards[index]
        if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        return value

    held = {i: {k: cut(i, v) for k, v in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": held}
