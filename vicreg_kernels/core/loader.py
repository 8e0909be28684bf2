"""The one loader of fused backends: an op's functions, by name, from where each backend has them.

An op's contract.py declares what it calls as the fields of a dataclass; the compiled op behind the
field `forward` of "vicreg" is `vicreg_forward`, and the Triton one is `forward` in
vicreg_kernels/vicreg/triton/launch.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch

from vicreg_kernels.core.library import NAMESPACES, without_autocast


@dataclass(frozen=True)
class Functions:
    """The base class of an op's Kernels, a dataclass with one function for each compiled op."""

    # Fields whose CUDA side multiplies with torch's own products, which autocast would lower. The
    # CPU's products are below the dispatcher: nothing is lowered there.
    PRODUCTS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls: type[K], functions: Mapping[str, Callable[..., Any]], backend: str) -> K:
        """Make Kernels of one backend's functions. An op whose backends take different arguments
        adapts them here.
        """
        return cls(**functions)


K = TypeVar("K", bound=Functions)


def compiled(op: str, kind: type[K], namespace: str) -> K:
    """The functions of `op` in a namespace of torch.ops."""
    ops, functions = getattr(torch.ops, namespace), {}
    on_cpu = namespace == NAMESPACES["cpu"]
    for field in fields(kind):
        packet = getattr(ops, f"{op}_{field.name}", None)
        if packet is None:  # sources that are newer than the library, or a schema that is missing
            raise RuntimeError(
                f"the compiled library has no {namespace}::{op}_{field.name}: build it anew (python"
                f" setup.py build_ext --inplace), or add it to csrc/{op}/registration.cpp"
            )
        lowered = field.name in kind.PRODUCTS and not on_cpu
        functions[field.name] = without_autocast(packet) if lowered else packet.default
    return kind.of(functions, "cpu" if on_cpu else "cuda")


@lru_cache(maxsize=64)
def load(op: str, kind: type[K], backend: str) -> K:
    """The functions of `op` on a fused backend that can run here (`dispatch.missing`)."""
    if backend == "triton":
        launch = importlib.import_module(f"vicreg_kernels.{op}.triton.launch")
        return kind.of({field.name: getattr(launch, field.name) for field in fields(kind)}, backend)
    return compiled(op, kind, NAMESPACES[backend])
