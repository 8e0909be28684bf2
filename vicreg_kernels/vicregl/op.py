"""Schemas, fakes and autograd of the VICRegL ops: nearest matches, and the matched difference.

`contract.py` says what each computes. Matches are integers and have no gradient; what is kept of
them is a rule of (count, weight) pairs on their ranks, so that the two roles of a pair of large
views share one search and one pass. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.core import calls, loader, schema
from vicreg_kernels.core.once import once
from vicreg_kernels.vicregl import reference
from vicreg_kernels.vicregl.contract import Kernels

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_MATCHES = "Tensor a, Tensor b, Tensor nearest_a, Tensor rank_a, Tensor nearest_b, Tensor rank_b"
_LIBRARY.define(
    "vicregl_match(Tensor a, Tensor b, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


class Matches(NamedTuple):
    """The result of `match`: int32, [U, V, B, L1] for a and [U, V, B, L2] for b."""

    nearest_a: Tensor
    rank_a: Tensor
    nearest_b: Tensor
    rank_b: Tensor


class Kept(NamedTuple):
    """The matches of one direction that count: for each t the counts[t] closest, by weights[t]."""

    counts: Sequence[int]
    weights: Sequence[float]


class Settings(NamedTuple):
    """The matches of a and of b that count, as the ops take them."""

    counts_a: list[int]
    weights_a: list[float]
    counts_b: list[int]
    weights_b: list[float]


_SETTINGS = f"str backend, {schema.arguments(Settings, counts_a='SymInt[]', counts_b='SymInt[]')}"
_LIBRARY.define(f"vicregl_pairs_forward({_MATCHES}, {_SETTINGS}) -> Tensor")
_LIBRARY.define(
    f"vicregl_pairs_backward(Tensor grad, {_MATCHES}, bool need_a, bool need_b, {_SETTINGS})"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "vicregl_match", "CompositeExplicitAutograd")
def _match(a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, ...]:
    return loader.load("vicregl", Kernels, backend).match(a, b)


@torch.library.impl(_LIBRARY, "vicregl_pairs_forward", "CompositeExplicitAutograd")
def _pairs_forward(
    a: Tensor,
    b: Tensor,
    nearest_a: Tensor,
    rank_a: Tensor,
    nearest_b: Tensor,
    rank_b: Tensor,
    backend: str,
    *settings: Any,
) -> Tensor:
    kernels = loader.load("vicregl", Kernels, backend)
    return kernels.pairs_forward(a, b, nearest_a, rank_a, nearest_b, rank_b, *settings)


@torch.library.impl(_LIBRARY, "vicregl_pairs_backward", "CompositeExplicitAutograd")
def _pairs_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    nearest_a: Tensor,
    rank_a: Tensor,
    nearest_b: Tensor,
    rank_b: Tensor,
    need_a: bool,
    need_b: bool,
    backend: str,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    kernels = loader.load("vicregl", Kernels, backend)
    matches = (nearest_a, rank_a, nearest_b, rank_b)
    return kernels.pairs_backward(grad, a, b, *matches, need_a, need_b, *settings)


@torch.library.register_fake("vicreg_kernels::vicregl_match")
def _match_fake(a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, ...]:
    pairs = (a.shape[0], b.shape[0], a.shape[1])
    return tuple(a.new_empty((*pairs, z.shape[2]), dtype=torch.int32) for z in (a, a, b, b))


@torch.library.register_fake("vicreg_kernels::vicregl_pairs_forward")
def _pairs_forward_fake(a: Tensor, *rest: Any) -> Tensor:
    return a.new_empty((), dtype=torch.float32)


@torch.library.register_fake("vicreg_kernels::vicregl_pairs_backward")
def _pairs_backward_fake(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    nearest_a: Tensor,
    rank_a: Tensor,
    nearest_b: Tensor,
    rank_b: Tensor,
    need_a: bool,
    need_b: bool,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if need_a else (0,)), b.new_empty(b.shape if need_b else (0,))


def match(a: Tensor, b: Tensor, backend: str) -> Matches:
    """Match each view of a [U, B, L1, C] with each of b [V, B, L2, C], in both directions."""
    a, b = a.detach(), b.detach()
    if backend == "reference":
        return Matches(*reference.match(a, b))
    run = _match if calls.direct(a, b) else torch.ops.vicreg_kernels.vicregl_match
    return Matches(*run(a, b, backend))


def pairs(
    a: Tensor, b: Tensor, matches: Matches, kept_a: Kept, kept_b: Kept, backend: str
) -> Tensor:
    """The weighted mean squared differences of the matches that are kept: a 0-d tensor, float32
    (float64 for float64 inputs).
    """
    rules = (list(kept_a.counts), list(kept_a.weights), list(kept_b.counts), list(kept_b.weights))
    if backend == "reference":
        return reference.pairs(a, b, *matches, *rules)
    return _Pairs.apply(a, b, *matches, backend, Settings(*rules))


class _Pairs(torch.autograd.Function):
    """Forward saves only its inputs; backward is one op call. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        nearest_a: Tensor,
        rank_a: Tensor,
        nearest_b: Tensor,
        rank_b: Tensor,
        backend: str,
        settings: Settings,
    ) -> Tensor:
        matches = (nearest_a, rank_a, nearest_b, rank_b)
        ctx.save_for_backward(a, b, *matches)
        ctx.backend, ctx.settings = backend, settings
        run = (
            _pairs_forward if calls.direct(a, b) else torch.ops.vicreg_kernels.vicregl_pairs_forward
        )
        return run(a, b, *matches, backend, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need_a, need_b = ctx.needs_input_grad[:2]
        args = (grad, *ctx.saved_tensors, need_a, need_b, ctx.backend, *ctx.settings)
        grad_a, grad_b = once("VICRegL", _gradient, *args)
        return grad_a if need_a else None, grad_b if need_b else None, *(None,) * 6


def _gradient(grad: Tensor, a: Tensor, b: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    direct = calls.direct(grad, a, b)
    run = _pairs_backward if direct else torch.ops.vicreg_kernels.vicregl_pairs_backward
    return run(grad, a, b, *args)
