"""A teacher's tensors beside its student's: unwrapped models, matched by name."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

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


def directions(module: nn.Module) -> set[str]:
    """Plain names of the buffers that hold spectral normalisation's singular vectors: of unit norm,
    which a mean of two is not.
    """
    names = set()
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, _SpectralNorm):
            kept = ["_u", "_v"]
        else:
            hooks = part._forward_pre_hooks.values()
            norms = [hook for hook in hooks if isinstance(hook, SpectralNorm)]
            kept = [hook.name + end for hook in norms for end in ("_u", "_v")]
        names |= {plain_name(f"{name}.{key}" if name else key) for key in kept}
    return names


def ties(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Map each tied tensor's later names to its first name. Two parameters that share memory after
    load_state_dict(assign=True) count as tied too.
    """
    first: dict[Any, str] = {}
    earlier = {name: first.setdefault(place(z), name) for name, z in tensors.items()}
    return {name: one for name, one in earlier.items() if one != name}


def place(z: Tensor) -> Any:
    """A key that is equal for the same tensor, and for the same view of one memory."""
    if torch.compiler.is_compiling() or hasattr(z, "to_local") or z.numel() == 0:
        return id(z)
    return z.data_ptr(), z.shape, z.stride()


def local(name: str, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's shards if fully_shard made both distributed; complex tensors as real ones."""
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


class Tree:
    """A module's parts, and where each of its tensors is kept.

    Looking names up takes a millisecond for a ViT, so it is done once for each pair of trees, and
    what it depends on is compared in every update: which parts and which names there are. The
    tensors are read anew each time, because optimizers and fully_shard replace them; none is held.
    """

    def __init__(self, root: nn.Module) -> None:
        named = list(root.named_modules(remove_duplicate=False))
        kept = [(part._parameters, part._buffers) for _, part in named]
        everything = [part._modules for _, part in named] + [d for pair in kept for d in pair]
        self._empty = [d for d in everything if not d]
        self._children: list[dict[str, Any]] = [p._modules for _, p in named if p._modules]
        self._as_seen = [dict(d) for d in self._children]
        self._tensors = [d for pair in kept for d in pair if d]
        self._keys = list(chain.from_iterable(self._tensors))
        self._sizes = list(map(len, self._tensors))
        self._values = [d.values() for d in self._tensors]
        # For parameters and for buffers: plain name -> place in `tensors()`.
        self.places: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self.absent: list[int] = []  # places of what is registered as None
        index = 0
        for (name, _), pair in zip(named, kept, strict=True):
            for places, tensors in zip(self.places, pair, strict=True):
                for key, z in tensors.items():
                    if z is None:
                        self.absent.append(index)
                    else:
                        places[plain_name(f"{name}.{key}" if name else key)] = index
                    index += 1

    def unchanged(self) -> bool:
        return (
            not any(self._empty)
            and self._children == self._as_seen
            and list(chain.from_iterable(self._tensors)) == self._keys
            and list(map(len, self._tensors)) == self._sizes
        )

    def tensors(self) -> list[Any]:
        return list(chain.from_iterable(self._values))
