"""A teacher's tensors beside its student's: unwrapped models, matched by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What torch.compile and activation checkpointing put into the names of a module's tensors.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and DataParallel."""
    while True:
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]
        elif isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        else:
            return module


def is_sharded(module: nn.Module) -> bool:
    """Whether fully_shard has been applied to the module or a part of it."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers by plain name; tied ones under each of their names."""
    return (
        {plain_name(k): z for k, z in module.named_parameters(remove_duplicate=False)},
        {plain_name(k): z for k, z in module.named_buffers(remove_duplicate=False)},
    )


def untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under its first name; also where load_state_dict(assign=True) has made two
    parameters of one memory.
    """

    def place(z: Tensor) -> Any:
        if torch.compiler.is_compiling() or hasattr(z, "to_local") or z.numel() == 0:
            return id(z)
        return z.data_ptr(), z.shape, z.stride()

    first: dict[Any, str] = {}
    return {name: z for name, z in tensors.items() if first.setdefault(place(z), name) == name}


def local(name: str, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The shards of this rank, where fully_shard made both distributed, and reals of complexes."""
    distributed = [hasattr(z, "to_local") for z in (teacher, student)]
    if any(distributed):
        if not all(distributed):
            whole = "the student's" if distributed[0] else "the teacher's"
            raise ValueError(
                f"module: parameter {name!r} is sharded, but {whole} is not;"
                " apply fully_shard to ema.module (and ema.shadow) as to the student"
            )
        layouts = [(z.device_mesh, z.placements) for z in (teacher, student)]
        if layouts[0] != layouts[1]:
            raise ValueError(
                f"module: parameter {name!r} lies on {layouts[1]}, the teacher's on {layouts[0]};"
                " apply fully_shard to both alike"
            )
        teacher, student = teacher.to_local(), student.to_local()
    if teacher.is_complex():
        teacher = torch.view_as_real(teacher)
    if student.is_complex():
        student = torch.view_as_real(student)
    return teacher, student


def check_names(kind: str, teacher: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    missing = [name for name in teacher if name not in student]
    unexpected = [name for name in student if name not in teacher]
    if missing or unexpected:
        raise ValueError(
            f"module: its {kind} are not the teacher's: missing {missing or 'none'},"
            f" unexpected {unexpected or 'none'}"
        )
    for name, z in teacher.items():
        if z.shape != student[name].shape:
            raise ValueError(
                f"module: {name!r} has shape {tuple(student[name].shape)}, the teacher's has"
                f" {tuple(z.shape)}"
            )


@dataclass
class Tree:
    """A module's parts, and where each of its tensors is kept: (dict, key), parameters first.

    Looking names up takes a millisecond for a ViT, so it is done once for each pair of trees; the
    tensors are read anew each time, because optimizers and fully_shard replace them.
    """

    parts: list[nn.Module] = field(default_factory=list)
    entries: int = 0

    @classmethod
    def of(cls, root: nn.Module) -> Tree:
        parts = [root]
        for part in parts:
            parts.extend([child for child in part._modules.values() if child is not None])
        return cls(parts, sum([len(p._parameters) + len(p._buffers) for p in parts]))

    def places(self) -> dict[int, tuple[dict[str, Any], str]]:
        """By the tensor's identity."""
        found: dict[int, tuple[dict[str, Any], str]] = {}
        for part in self.parts:
            for kept in (part._parameters, part._buffers):
                for key, z in kept.items():
                    if z is not None:
                        found.setdefault(id(z), (kept, key))
        return found
