"""The fused backends of the attention op behind three functions: forward, backward, rotate.

What they take and give, with B = 1 and packed tokens where the rules have offsets:

    forward(q, k, v, *rules, *rope, scale) -> out [B, H, Tq, d], lse float32 [B, H, Tq]
    backward(grad, q, k, v, out, lse, *rules, *rope, need_q, need_k, need_v, scale) -> dq, dk, dv
    rotate(x, table, index, offsets, grid, adjoint) -> [B, H, T, d]

rules and rope are the fields of masks.MaskArguments and rope.RopeArguments. q, k, v have any
strides; results lie as [B, T, H, d] in memory, which is how they are used, and a gradient that is
not needed is empty. lse is the natural logarithm of the sum of exp(scale q k) over the keys that a
query sees, -inf where it sees none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vicreg_kernels import dispatch
from vicreg_kernels.library import NAMESPACES

# Tokens of a sample whose keys and values the CUDA kernels hold in shared memory.
LONGEST_IN_SHARED = 256


@dataclass(frozen=True)
class Kernels:
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    rotate: Callable[..., Tensor]


@lru_cache(maxsize=64)
def load(backend: str) -> Kernels:
    if backend == "triton":
        kernels = importlib.import_module("vicreg_kernels.attention.triton")
        return Kernels(kernels.forward, kernels.backward, kernels.rotate)
    return compiled(NAMESPACES[backend])


def compiled(namespace: str) -> Kernels:
    ops = getattr(torch.ops, namespace)
    return Kernels(
        ops.attention_forward.default,
        ops.attention_backward.default,
        ops.attention_rotate.default,
    )


def are_plain(*tensors: Tensor) -> bool:
    """Whether they are tensors, and no subclass with a say of its own in what is called."""
    return all(map(_PLAIN.__contains__, map(type, tensors)))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def direct(*tensors: Tensor) -> bool:
    """Whether a backend may be called without the op around it, whose way through torch.library and
    back into Python costs 30 us a forward and backward.

    Not where somebody looks at the ops: a compiler, a tracer, a dispatch mode, a tensor subclass.
    Nor for views with the sign still to be changed, which the dispatcher writes out.
    """
    return (
        not (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None
        )
        and are_plain(*tensors)
        and not any(map(Tensor.is_neg, tensors))
    )


def unfit(dtype: torch.dtype, tokens: int) -> dict[str, str]:
    """Backends that do not take samples of so many tokens, and why."""
    if dtype == torch.float32:
        return {"cuda": "its tensor-core products take bfloat16 or float16, not float32"}
    if tokens > LONGEST_IN_SHARED:
        return {"cuda": f"it takes at most {LONGEST_IN_SHARED} tokens a sample (they fit on chip)"}
    return {}


def _sizes(op: str, device: torch.device, dtype: torch.dtype) -> list[dispatch.Size]:
    return [
        dispatch.Size(tokens, {"unfit": unfit(dtype, tokens)})
        for tokens in (0, LONGEST_IN_SHARED + 1)
    ]


dispatch.register("attention", dispatch.Sizes("the longest sample's tokens", _sizes))
dispatch.register("rope")


def empty_like_heads(x: Tensor, tokens: int | None = None) -> Tensor:
    """Uninitialised [B, H, T, d] that lies as [B, T, H, d]; the one place that says how."""
    batch, heads, own, dim = x.shape
    tokens = own if tokens is None else tokens
    strides = (tokens * heads * dim, dim, heads * dim, 1)
    return x.new_empty_strided((batch, heads, tokens, dim), strides)
