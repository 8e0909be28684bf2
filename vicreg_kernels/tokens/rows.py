"""Gather and scatter of token rows: schemas, fakes, autograd and the public functions.

Both are linear and each is the other's gradient, so they differentiate to any order. No index of
[B, K, D] exists anywhere; `contract.py` says what the kernels take.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.core import calls, dispatch, loader, reals
from vicreg_kernels.core.checks import Seen, not_empty
from vicreg_kernels.core.once import once
from vicreg_kernels.tokens import checks, reference
from vicreg_kernels.tokens.checks import Offsets
from vicreg_kernels.tokens.contract import Kernels

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define("tokens_gather(Tensor x, Tensor index, Tensor? offsets, str backend) -> Tensor")
_LIBRARY.define(
    "tokens_scatter(Tensor rows, Tensor index, Tensor? offsets, SymInt batch, SymInt length,"
    " float fill, bool accumulate, bool reduce, str backend) -> Tensor"
)


@torch.library.impl(_LIBRARY, "tokens_gather", "CompositeExplicitAutograd")
def _gather(x: Tensor, index: Tensor, offsets: Tensor | None, backend: str) -> Tensor:
    if checks.wanted(backend, index):
        check_values(index, offsets, x.shape[1])
    return loader.load("tokens", Kernels, backend).gather(x, index, offsets)


@torch.library.impl(_LIBRARY, "tokens_scatter", "CompositeExplicitAutograd")
def _scatter(
    rows: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    batch: int,
    length: int,
    fill: float,
    accumulate: bool,
    reduce: bool,
    backend: str,
) -> Tensor:
    if checks.wanted(backend, index):
        check_values(index, offsets, length, unique=not accumulate)
    return loader.load("tokens", Kernels, backend).scatter(
        rows, index, offsets, batch, length, fill, accumulate, reduce
    )


@torch.library.register_fake("vicreg_kernels::tokens_gather")
def _gather_fake(x: Tensor, index: Tensor, offsets: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((*index.shape, x.shape[-1]))


@torch.library.register_fake("vicreg_kernels::tokens_scatter")
def _scatter_fake(
    rows: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    batch: int,
    length: int,
    fill: float,
    accumulate: bool,
    reduce: bool,
    backend: str,
) -> Tensor:
    return rows.new_empty((length, rows.shape[-1]) if reduce else (batch, length, rows.shape[-1]))


def check_values(index: Tensor, offsets: Tensor | None, length: int, unique: bool = False) -> None:
    """Raise a ValueError for offsets that do not fit and indices out of range."""
    if offsets is not None:
        checks.offset_values("offsets", offsets, index.numel())
    checks.index_values("index", index, length)
    if unique:
        ids = None if offsets is None else reference.samples_of(offsets, index.numel())
        checks.unique("index", index, ids)


def gather_rows(x: Tensor, index: Tensor, offsets: Tensor | None, backend: str) -> Tensor:
    """Run the gather op, without the dispatcher if `calls.direct` allows it."""
    run = _gather if calls.direct(x, index, offsets) else torch.ops.vicreg_kernels.tokens_gather
    return run(x, index, offsets, backend)


def scatter_rows(rows: Tensor, index: Tensor, offsets: Tensor | None, *settings: Any) -> Tensor:
    """Run the scatter op, without the dispatcher if `calls.direct` allows it."""
    direct = calls.direct(rows, index, offsets)
    run = _scatter if direct else torch.ops.vicreg_kernels.tokens_scatter
    return run(rows, index, offsets, *settings)


class Gather(torch.autograd.Function):
    """x [B, T, D], index, offsets, backend -> rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, offsets: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(index, offsets)
        ctx.extent = x.shape[:2]
        ctx.backend = backend
        return gather_rows(x, index, offsets, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, offsets = ctx.saved_tensors
        args = (grad, index, offsets, *ctx.extent, 0.0, True, False, ctx.backend)
        enabled = torch.is_grad_enabled()
        grad_x = Scatter.apply(*args) if enabled else once("gather", scatter_rows, *args)
        return grad_x, None, None, None


class Scatter(torch.autograd.Function):
    """rows, index, offsets, batch, length, fill, accumulate, reduce, backend -> [B, length, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        index: Tensor,
        offsets: Tensor | None,
        batch: int,
        length: int,
        fill: float,
        accumulate: bool,
        reduce: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(index, offsets)
        ctx.backend = backend
        settings = (batch, length, fill, accumulate, reduce, backend)
        return scatter_rows(rows, index, offsets, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        index, offsets = ctx.saved_tensors
        args = (grad, index, offsets, ctx.backend)
        enabled = torch.is_grad_enabled()
        return Gather.apply(*args) if enabled else once("scatter", gather_rows, *args), *(None,) * 8


def choose(backend: str | None, like: Seen) -> str:
    shape, dtype, device, _ = like
    name = dispatch.choose("tokens", backend, device, dtype)
    if not torch.compiler.is_compiling():
        dispatch.log_choice("tokens", name, backend, device, shape)
    return name


@calls.remembered
def _check_gather(packed: bool, backend: str | None, *seen: Any) -> None:
    """seen: x, index."""
    dispatch.check_backend(backend)
    x, index = checks.each(seen)
    checks.tensor("x", x, (3,), "[B, T, D]")
    not_empty("x", x[0])
    _check_index(index, packed, x[2])
    if not packed and index[0][0] != x[0][0]:
        raise ValueError(
            f"index: got {index[0][0]} samples, takes the batch's {x[0][0]}, one row each"
        )


@calls.remembered
def _check_scatter(length: int, packed: bool, backend: str | None, *seen: Any) -> None:
    """seen: tokens, index."""
    dispatch.check_backend(backend)
    tokens, index = checks.each(seen)
    checks.tensor(
        "tokens", tokens, (2,) if packed else (3,), "[total, D]" if packed else "[B, K, D]"
    )
    shape = tokens[0]
    if not 1 <= length < checks.MOST_TOKENS:
        raise ValueError(f"length: got {length}, takes at least 1 and less than 2^63")
    if shape[-1] < 1 or (not packed and shape[0] < 1):
        raise ValueError(f"tokens: got no elements (shape {tuple(shape)})")
    _check_index(index, packed, tokens[2])
    if index[0] != shape[:-1]:
        raise ValueError(
            f"index: got shape {tuple(index[0])}, takes that of the tokens, {tuple(shape[:-1])}"
        )


def _check_index(index: Seen, packed: bool, device: torch.device) -> None:
    shapes = "[total] with offsets" if packed else "[B, K], or [total] with offsets"
    checks.index("index", index, packed, shapes, device)


def gather_tokens(
    x: Tensor, index: Tensor, *, offsets: Offsets | None = None, backend: str | None = None
) -> Tensor:
    """Take the rows of each sample that `index` names: x[b, index[b, k]].

    Args:
        x: [B, T, D], float32, bfloat16, float16 or float64, any strides.
        index: int32 or int64, [B, K], or packed [total] with `offsets`. Repeats are allowed; K = 0
            gives an empty tensor.
        offsets: the first packed row of each sample and the total, [B + 1], on the host or beside
            x; sample b's rows are offsets[b] to offsets[b + 1] - 1. None: [B, K].
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input.

    Returns:
        [B, K, D] or [total, D], x's dtype. The gradient of x adds up the gradients of a token's
        rows in ascending order, in float32, without atomics: two runs are bitwise equal whether
        indices repeat or not. Differentiable to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device, index or offset that is not one of the above;
            the message names the argument. On a GPU the values of index and offsets are checked
            where VICREG_KERNELS_DEBUG=1; without it an index out of range gives a row of NaN.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    seen = calls.seen("x", x)
    _check_gather(offsets is not None, backend, *seen, *calls.seen("index", index))
    at = None
    if offsets is not None:
        at = checks.offsets("offsets", offsets, x.shape[0], index.shape[0], x)
    name = choose(backend, seen)
    if name == "reference":
        if checks.wanted(name, index):
            check_values(index, at, x.shape[1])
        return reference.gather(x, index, at)
    return Gather.apply(x, index.contiguous(), at, name)


def scatter_tokens(
    tokens: Tensor,
    index: Tensor,
    length: int,
    *,
    offsets: Offsets | None = None,
    fill: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Write row k of sample b to out[b, index[b, k]]: the inverse of `gather_tokens`.

    Args:
        tokens: [B, K, D], or packed [total, D] with `offsets`; dtypes and strides as x there.
        index: int32 or int64, [B, K] or [total]; each token at most once in a sample.
        length: T, the tokens of each sample of the result.
        offsets, backend: as in `gather_tokens`.
        fill: the value of tokens that no row is written to.

    Returns:
        [B, length, D], tokens' dtype. The gradient is a gather. Differentiable to any order.

    Raises: as `gather_tokens`. A token that is named twice in a sample is a ValueError on the CPU
        and in debug mode; elsewhere the last of its rows is taken.
    """
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length: got {type(length).__name__}, takes an int")
    seen = calls.seen("tokens", tokens)
    _check_scatter(length, offsets is not None, backend, *seen, *calls.seen("index", index))
    at = None
    if offsets is not None:
        at = checks.offsets("offsets", offsets, None, index.shape[0], tokens)
    batch = tokens.shape[0] if at is None else at.shape[0] - 1
    fill = float(reals.real("fill", fill, "a number"))
    if math.isfinite(fill) and abs(fill) > torch.finfo(tokens.dtype).max:
        raise ValueError(f"fill: got {fill}, takes a number that {tokens.dtype} holds")
    name = choose(backend, seen)
    if name == "reference":
        if checks.wanted(name, index):
            check_values(index, at, length, unique=True)
        return reference.scatter(tokens, index, at, batch, length, fill)
    return Scatter.apply(tokens, index.contiguous(), at, batch, length, fill, False, False, name)
