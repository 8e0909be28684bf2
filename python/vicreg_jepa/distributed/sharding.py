"""Distributes a method over ranks, as copies (DistributedDataParallel) or shards (FSDP2), and
gathers whole tensors for checkpoints, from which any number of ranks can resume in either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vicreg_jepa.config import Training
from vicreg_jepa.models.vit import Block

DDP = nn.parallel.DistributedDataParallel
# Batch norm's buffers are equal on all ranks already. torch 2.13 renamed the argument.
_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DDP.__init__).parameters
    else "broadcast_buffers"
)


def distribute(method: nn.Module, settings: Training, ranks: int) -> nn.Module:
    """Return the module to call instead of `method`. `method` itself is changed: its batch norm is
    over all ranks, and with parallel="fsdp" its parameters are shards. Make optimizers afterwards.
    """
    if ranks == 1:
        if settings.parallel == "fsdp":
            raise ValueError(
                "training.parallel: got 'fsdp' in one process, takes 'ddp' or at least two: "
                "torchrun --nproc-per-node 2 -m vicreg_jepa train ..."
            )
        return method
    device = torch.device(settings.device)
    if device.index is not None:
        raise ValueError(f"training.device: got {settings.device!r} on {ranks} ranks, takes 'cuda'")
    # Imported here, because it marks a function that torch.compile must skip, and for that torch
    # imports its compiler.
    from vicreg_jepa.distributed.batchnorm import synchronised

    synchronised(method, device)
    if settings.parallel == "ddp":
        return DDP(method, **{_BUFFERS: False})
    return _sharded(method, device, ranks)


def _sharded(method: nn.Module, device: torch.device, ranks: int) -> nn.Module:
    """Shard each transformer block of student and teacher by itself, and the rest together."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(device.type, (ranks,))
    for part in list(method.modules()):
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh)
    fully_shard(method, mesh=mesh)
    # The monitor of the spread calls `features` without `forward`.
    register_fsdp_forward_method(method, "features")
    return method


def is_sharded(method: nn.Module) -> bool:
    return hasattr(method, "reshard")


def is_shard(z: Any) -> bool:
    return isinstance(z, Tensor) and hasattr(z, "full_tensor")


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather shards and copy each tensor to the CPU, one at a time; return {} if `keep` is False.

    With shards every rank must call it, with the same names in the same order.
    """
    copies = {}
    for name, z in tensors.items():
        z = z.detach()
        if is_shard(z):
            z = z.full_tensor()
        if keep:
            copies[name] = z.cpu()
    return copies


def shard_like(value: Any, like: Any) -> Any:
    """This rank's shard of `value`, sharded like `like`; `value` itself if `like` is not
    sharded.
    """
    if not is_shard(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read the whole tensor, so nothing is sent.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def load(method: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """load_state_dict of whole tensors."""
    shards = method.state_dict()
    method.load_state_dict(
        {k: shard_like(z, shards[k]) if k in shards else z for k, z in tensors.items()}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """load_state_dict of whole tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, kept in state["state"].items():
        for name, value in kept.items():
            kept[name] = shard_like(value, parameters[index])
    optimizer.load_state_dict(state)
