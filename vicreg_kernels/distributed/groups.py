"""The group of ranks that a call communicates in, and what runs there."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from vicreg_kernels.core import dispatch, library


def resolve(process_group: Any) -> Any:
    """Return the group to communicate in, or None for None, False and a group of one rank.

    process_group: None, False, True (the default group) or a torch.distributed.ProcessGroup that
    this rank belongs to.

    Raises TypeError, ValueError or RuntimeError naming process_group.
    """
    if process_group is None or process_group is False:
        return None
    if not dist.is_available():
        raise RuntimeError("process_group: this torch is built without torch.distributed")
    if process_group is True:
        if not dist.is_initialized():
            raise RuntimeError(
                "process_group: got True, but there is no default group: call "
                "torch.distributed.init_process_group first"
            )
        process_group = dist.group.WORLD
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: got a group that this rank does not belong to")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: got {type(process_group).__name__}, takes None, True or a "
            "torch.distributed.ProcessGroup"
        )
    return process_group if dist.get_world_size(process_group) > 1 else None


def choose_backend(backend: str | None, dtype: torch.dtype) -> str:
    """Return "ranks" or "reference", whichever runs for `backend` with a process group.

    Raises ValueError for another named backend.
    """
    dispatch.check_backend(backend)
    named = backend if backend is not None else dispatch.ENVIRONMENT_BACKEND
    if named not in (None, "reference"):
        source = "backend" if backend is not None else "VICREG_KERNELS_BACKEND"
        raise ValueError(
            f"{source}: got {named!r}, takes None or 'reference' with a process_group: a rank's "
            "share is a rectangular product of its rows with all rows, which torch's own matmul "
            "does on every device; the fused backends know the square ones of one process"
        )
    return "reference" if named or dtype == torch.float64 else "ranks"


@library.constant_in_graphs
def group_name(process_group: Any) -> str | None:
    """Return the name of `resolve(process_group)`, as ops take it, or None without a group. It is a
    constant of a compiled graph.
    """
    group = resolve(process_group)
    return None if group is None else group.group_name


def by_name(name: str) -> Any:
    """Return the group of this `group_name`."""
    return dist.distributed_c10d._resolve_process_group(name)
