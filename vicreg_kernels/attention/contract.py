"""The fused backends of the attention op behind three functions: forward, backward, rotate.

What they take and give, with B = 1 and packed tokens where the rules have offsets:

    forward(q, k, v, *rules, *rope, scale) -> out [B, H, Tq, d], lse float32 [B, H, Tq]
    backward(grad, q, k, v, out, lse, *rules, *rope, need_q, need_k, need_v, scale) -> dq, dk, dv
    rotate(x, table, index, offsets, grid, adjoint) -> [B, H, T, d]

rules and rope are the fields of masks.MaskArguments and rope.RopeArguments. q, k, v have any
strides; results lie as [B, T, H, d] in memory, which is how they are used, and a gradient that is
not needed is empty. lse is the logarithm of base 2 of the sum of exp(scale q k) over the keys that
a query sees, -inf where it sees none. Of base 2, as the exponents that both passes form: large
scores lose a digit with each change of base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.attention.masks import MaskArguments
from vicreg_kernels.attention.rope import RopeArguments
from vicreg_kernels.core import loader, registry

# Tokens of a sample whose keys and values the CUDA kernels hold in shared memory.
LONGEST_IN_SHARED = 256


class Settings(NamedTuple):
    """What a call computes: the fields of rules, then those of rope and scale, as the ops take
    them.
    """

    rules: MaskArguments
    rope: RopeArguments
    scale: float

    @classmethod
    def of(cls, *arguments: Any) -> Settings:
        """The arguments of an op, which are flat, as settings."""
        count = len(MaskArguments._fields)
        *rope, scale = arguments[count:]
        return cls(MaskArguments(*arguments[:count]), RopeArguments(*rope), scale)

    def apart(self) -> tuple[tuple[Tensor | None, ...], Settings]:
        """The tensors, as `together` takes them, and the settings without them."""
        (q_offsets, k_offsets, lengths, keep, bounds, *numbers), rope, scale = self
        tensors = (q_offsets, k_offsets, lengths, keep, bounds)
        rules = MaskArguments(None, None, None, None, None, *numbers)
        left = Settings(rules, RopeArguments(None, None, None, rope.grid), scale)
        return (*tensors, rope.table, rope.q_index, rope.k_index), left

    def together(
        self,
        q_offsets: Tensor | None,
        k_offsets: Tensor | None,
        lengths: Tensor | None,
        keep: Tensor | None,
        bounds: Tensor | None,
        table: Tensor | None,
        q_index: Tensor | None,
        k_index: Tensor | None,
    ) -> Settings:
        """These settings with those tensors."""
        rules, rope, scale = self
        sizes = (rules.max_q, rules.max_k, rules.tokens_per_frame, rules.window)
        rules = MaskArguments(q_offsets, k_offsets, lengths, keep, bounds, *sizes)
        return Settings(rules, RopeArguments(table, q_index, k_index, rope.grid), scale)


@dataclass(frozen=True)
class Kernels(loader.Functions):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    rotate: Callable[..., Tensor]


def are_plain(*tensors: Tensor) -> bool:
    """Whether all are plain tensors, not of a subclass that may change what a call does."""
    return all(map(_PLAIN.__contains__, map(type, tensors)))


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def direct(*tensors: Tensor) -> bool:
    """Whether a backend may be called directly, without the registered op, which costs 30 us for a
    forward and backward in torch.library.

    It may not if a compiler, a tracer, a dispatch mode or a tensor subclass must see the op, nor
    for a tensor with a pending negation, which only the dispatcher carries out.
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


def cannot_run(dtype: torch.dtype, tokens: int) -> dict[str, str]:
    """Backends that do not take samples of so many tokens, and why."""
    if dtype == torch.float32:
        return {"cuda": "its tensor-core products take bfloat16 or float16, not float32"}
    if tokens > LONGEST_IN_SHARED:
        return {"cuda": f"it takes at most {LONGEST_IN_SHARED} tokens a sample (they fit on chip)"}
    return {}


def _sizes(op: str, device: torch.device, dtype: torch.dtype) -> list[registry.Size]:
    return [
        registry.Size(tokens, {"cannot_run": cannot_run(dtype, tokens)})
        for tokens in (0, LONGEST_IN_SHARED + 1)
    ]


registry.register(
    "attention",
    attention=registry.Sizes("the longest sample's tokens", _sizes),
    rope=registry.ANY_SIZE,
)


def empty_like_heads(x: Tensor, tokens: int | None = None) -> Tensor:
    """Uninitialised [B, H, T, d] that lies as [B, T, H, d]; the one place that says how."""
    batch, heads, own, dim = x.shape
    tokens = own if tokens is None else tokens
    strides = (tokens * heads * dim, dim, heads * dim, 1)
    return x.new_empty_strided((batch, heads, tokens, dim), strides)
