"""Sequence assembly for predictors: schemas, fakes, autograd and the public function.

The order is found by counting, not by an argsort: a token's place is the number of tokens before it
in its own list and in the other one. One kernel then moves every row to its place, adding the
positions on the way. Backward: the context's rows are gathered from their places, the mask token's
gradient is a column sum over partial rows, the positions' a scatter summed over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.core import calls, dispatch, loader
from vicreg_kernels.core.checks import Seen, not_empty
from vicreg_kernels.core.once import once
from vicreg_kernels.tokens import checks, reference
from vicreg_kernels.tokens.checks import Offsets
from vicreg_kernels.tokens.contract import Kernels
from vicreg_kernels.tokens.rows import choose, gather_rows, gather_tokens, scatter_rows

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define(
    "tokens_order(Tensor context_index, Tensor target_index, Tensor? context_offsets,"
    " Tensor? target_offsets, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "tokens_assemble(Tensor context, Tensor context_index, Tensor context_rows, Tensor target,"
    " Tensor target_index, Tensor target_rows, Tensor? positions, str backend) -> Tensor"
)
_LIBRARY.define("tokens_column_sum(Tensor sequence, Tensor rows, str backend) -> Tensor")


class Assembly(NamedTuple):
    """The result of `assemble_tokens`.

    tokens: [P, S, D], S = Kc + Kt, in ascending grid order; packed: [total, D].
    index: the tokens' grid positions, for rotary position: [P, S] or [total].
    context_rows, target_rows: where each context and target token stands: [P, Kc], [P, Kt], rows of
        its sequence; packed: rows of the whole.
    offsets: packed: [B + 1], the sequences' first rows and the total; else None.
    """

    tokens: Tensor
    index: Tensor
    context_rows: Tensor
    target_rows: Tensor
    offsets: Tensor | None

    def targets(self, sequence: Tensor, *, backend: str | None = None) -> Tensor:
        """Take the target rows out of a sequence in this order, such as the predictor's output: [P,
        Kt, D] or [total targets, D], in the order of target_index.
        """
        if self.offsets is None:
            return gather_tokens(sequence, self.target_rows, backend=backend)
        return gather_tokens(sequence[None], self.target_rows[None], backend=backend)[0]


@torch.library.impl(_LIBRARY, "tokens_order", "CompositeExplicitAutograd")
def _order(
    context_index: Tensor,
    target_index: Tensor,
    context_offsets: Tensor | None,
    target_offsets: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    where = (context_index, target_index, context_offsets, target_offsets)
    if checks.wanted(backend, context_index):
        check_order_values(*where)
    return loader.load("tokens", Kernels, backend).order(*where)


@torch.library.impl(_LIBRARY, "tokens_assemble", "CompositeExplicitAutograd")
def _assemble(
    context: Tensor,
    context_index: Tensor,
    context_rows: Tensor,
    target: Tensor,
    target_index: Tensor,
    target_rows: Tensor,
    positions: Tensor | None,
    backend: str,
) -> Tensor:
    if positions is not None and checks.wanted(backend, context_index):
        check_position_values(context_index, target_index, positions)
    return loader.load("tokens", Kernels, backend).assemble(
        context, context_index, context_rows, target, target_index, target_rows, positions
    )


@torch.library.impl(_LIBRARY, "tokens_column_sum", "CompositeExplicitAutograd")
def _column_sum(sequence: Tensor, rows: Tensor, backend: str) -> Tensor:
    return loader.load("tokens", Kernels, backend).column_sum(sequence, rows)


@torch.library.register_fake("vicreg_kernels::tokens_order")
def _order_fake(
    context_index: Tensor, target_index: Tensor, context_offsets: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if context_offsets is not None:
        total = context_index.shape[0] + target_index.shape[0]
        shapes = [(total,), tuple(context_index.shape), tuple(target_index.shape)]
    else:
        count, kept = target_index.shape[0], context_index.shape[1]
        shapes = [(count, kept + target_index.shape[1]), (count, kept), tuple(target_index.shape)]
    return tuple(context_index.new_empty(shape) for shape in shapes)


@torch.library.register_fake("vicreg_kernels::tokens_assemble")
def _assemble_fake(
    context: Tensor,
    context_index: Tensor,
    context_rows: Tensor,
    target: Tensor,
    target_index: Tensor,
    target_rows: Tensor,
    positions: Tensor | None,
    backend: str,
) -> Tensor:
    length = context_rows.shape[1] + target_rows.shape[1]
    return context.new_empty((target_rows.shape[0], length, context.shape[2]))


@torch.library.register_fake("vicreg_kernels::tokens_column_sum")
def _column_sum_fake(sequence: Tensor, rows: Tensor, backend: str) -> Tensor:
    return sequence.new_empty((sequence.shape[2],), dtype=torch.float32)


def check_order_values(
    context_index: Tensor,
    target_index: Tensor,
    context_offsets: Tensor | None,
    target_offsets: Tensor | None,
) -> None:
    for name, index, offsets in (
        ("context", context_index, context_offsets),
        ("target", target_index, target_offsets),
    ):
        if offsets is not None:
            checks.offset_values(f"{name}_offsets", offsets, index.numel())
        checks.index_values(f"{name}_index", index, 2**31 - 1)


def check_position_values(context_index: Tensor, target_index: Tensor, positions: Tensor) -> None:
    checks.index_values("context_index", context_index, positions.shape[0])
    checks.index_values("target_index", target_index, positions.shape[0])


class _Assemble(torch.autograd.Function):
    """context [C, Kc, D], target [D] float32 or [P, Kt, D], positions float32 [T, D] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        context: Tensor,
        target: Tensor,
        positions: Tensor | None,
        context_index: Tensor,
        target_index: Tensor,
        index: Tensor,
        context_rows: Tensor,
        target_rows: Tensor,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(index, context_rows, target_rows)
        ctx.contexts = context.shape[0]
        ctx.single = target.dim() == 1
        ctx.table = 0 if positions is None else positions.shape[0]
        ctx.backend = backend
        direct = calls.direct(
            context, target, positions, context_index, target_index, context_rows, target_rows
        )
        run = _assemble if direct else torch.ops.vicreg_kernels.tokens_assemble
        return run(
            context,
            context_index,
            context_rows,
            target,
            target_index,
            target_rows,
            positions,
            backend,
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        settings = (*ctx.needs_input_grad[:3], ctx.contexts, ctx.single, ctx.table, ctx.backend)
        grads = once("assembly", _gradients, grad, *ctx.saved_tensors, *settings)
        return *grads, *(None,) * 6


def _gradients(
    grad: Tensor,
    index: Tensor,
    context_rows: Tensor,
    target_rows: Tensor,
    need_context: bool,
    need_target: bool,
    need_positions: bool,
    contexts: int,
    single: bool,
    table: int,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of context, target and positions; None where not needed."""
    context = target = positions = None
    if need_context:
        context = gather_rows(grad, context_rows, None, backend)
        if contexts != grad.shape[0]:  # several targets share a context
            context = context.unflatten(0, (-1, contexts)).sum(0)
    if need_target and single:
        direct = calls.direct(grad, target_rows)
        run = _column_sum if direct else torch.ops.vicreg_kernels.tokens_column_sum
        target = run(grad, target_rows, backend)
    elif need_target:
        target = gather_rows(grad, target_rows, None, backend)
    if need_positions:
        shape = (grad.shape[0], table, 0.0, True, True, backend)
        positions = scatter_rows(grad, index, None, *shape).to(torch.float32)
    return context, target, positions


def _check_like(name: str, z: Seen, context: Seen) -> None:
    shape, dtype, device, _ = z
    if shape[-1] != context[0][-1]:
        raise ValueError(f"{name}: got D = {shape[-1]}, takes the context's D = {context[0][-1]}")
    checks.same_device(name, device, context[2])
    if (dtype == torch.float64) != (context[1] == torch.float64):
        raise TypeError(
            f"{name}: got dtype {dtype} with a context of {context[1]}, takes float64 with"
            " float64, or any two of float32, bfloat16 and float16"
        )


def _check_index(name: str, index: Seen, packed: bool, device: torch.device) -> None:
    shapes = "[total] with offsets" if packed else "[B, K]"
    checks.index(name, index, packed, shapes, device)


@calls.remembered
def _check(packed: bool, backend: str | None, *seen: Any) -> bool:
    """Whether mask_token is one for all targets. seen: context, context_index, mask_token,
    target_index and, where given, positions.
    """
    dispatch.check_backend(backend)
    context, context_index, mask_token, target_index, *table = checks.each(seen)
    checks.tensor(
        "context", context, (2,) if packed else (3,), "[total, D]" if packed else "[B, K, D]"
    )
    shape, _, device, _ = context
    if shape[-1] < 1 or (not packed and shape[0] < 1):
        raise ValueError(f"context: got no elements (shape {tuple(shape)})")
    _check_index("context_index", context_index, packed, device)
    _check_index("target_index", target_index, packed, device)
    kept, wanted = context_index[0], target_index[0]
    if kept != shape[:-1]:
        raise ValueError(
            f"context_index: got shape {tuple(kept)}, takes that of the context's"
            f" rows, {tuple(shape[:-1])}"
        )
    if not packed and (wanted[0] < 1 or wanted[0] % shape[0] != 0):
        raise ValueError(
            f"target_index: got {wanted[0]} samples, takes the context's {shape[0]} or a multiple"
        )
    if kept.numel() == 0 and wanted.numel() == 0:
        raise ValueError("context_index: got no tokens, takes at least one here or in target_index")
    single = _single(mask_token, context, wanted)
    for positions in table:
        checks.tensor("positions", positions, (2,), "[T, D]")
        not_empty("positions", positions[0])
        _check_like("positions", positions, context)
    return single


def _single(mask_token: Seen, context: Seen, wanted: torch.Size) -> bool:
    """Whether mask_token, checked here, is one for all; else it has a row for each of `wanted`."""
    shapes = "[D], [1, 1, D] or a row for each target"
    checks.tensor("mask_token", mask_token, (1, 2, 3), shapes)
    _check_like("mask_token", mask_token, context)
    shape = mask_token[0]
    if shape[:-1] == wanted and len(shape) > 1:
        return False
    if shape.numel() != shape[-1]:
        raise ValueError(
            f"mask_token: got shape {tuple(shape)}, takes {shapes}, {(*wanted, context[0][-1])}"
        )
    return True


def _joined(masks: Sequence[Tensor], packed: bool, device: torch.device) -> Tensor:
    """The target_index [M B, K] of M masks [B, K]."""
    if packed or len(masks) == 0:
        raise ValueError("target_index: got a list, takes one with masks, without offsets")
    for one in masks:
        _check_index("target_index", calls.seen("target_index", one), packed, device)
        if one.shape != masks[0].shape:
            raise ValueError(
                f"target_index: got masks of {tuple(masks[0].shape)} and {tuple(one.shape)},"
                " takes equal ones"
            )
    return torch.cat(list(masks))


def assemble_tokens(
    context: Tensor,
    context_index: Tensor,
    mask_token: Tensor,
    target_index: Tensor | Sequence[Tensor],
    *,
    positions: Tensor | None = None,
    context_offsets: Offsets | None = None,
    target_offsets: Offsets | None = None,
    backend: str | None = None,
) -> Assembly:
    """Assemble context tokens and mask tokens into one sequence in grid order, for a predictor.

    The sequence is [context tokens, mask tokens], sorted stably by grid position; if `positions` is
    given, positions[index] is added to each token. The V-JEPA 2 predictor builds this sequence by
    concatenation, argsort and a gather. I-JEPA's predictor builds it in another order, which does
    not matter to attention (Assran et al., 2023, arXiv:2301.08243; Assran et al., 2025,
    arXiv:2506.09985).

    Args:
        context: [B, Kc, D], or packed [total, D] with context_offsets; float32, bfloat16, float16
            or float64, any strides.
        context_index, target_index: grid positions, int32 or int64, from 0 to 2^31 - 2, sorted or
            not: [B, Kc] and [B, Kt], or packed [total]. target_index may also be [M B, Kt],
            mask-major, or a list of M of [B, Kt]: each of M targets with the same context.
        mask_token: [D] or [1, 1, D], one for all; or a row for each target, [P, Kt, D] or
            [total, D].
        positions: a table [T, D] that is added by grid position, such as I-JEPA's sine-cosine
            table; indices must then be below T.
        context_offsets, target_offsets: both or neither, as in `gather_tokens`.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input.

    Returns:
        Assembly(tokens, index, context_rows, target_rows, offsets), with a method
        targets(sequence) that takes the target rows out again. tokens have the context's dtype;
        sums are made in float32 and rounded once. Differentiable in context, mask_token and
        positions; fused backends once, "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device, index or offset that is not one of the above;
            the message names the argument. On a GPU the values of indices and offsets are checked
            where VICREG_KERNELS_DEBUG=1; without it a row whose index is outside the table is NaN.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    packed = context_offsets is not None
    if packed != (target_offsets is not None):
        name = "target_offsets" if packed else "context_offsets"
        raise ValueError(f"{name}: got None, takes offsets where the other index is packed")
    seen = [*calls.seen("context", context), *calls.seen("context_index", context_index)]
    targets: Any = target_index
    if isinstance(target_index, (list, tuple)):
        targets = _joined(target_index, packed, context.device)
    seen += calls.seen("mask_token", mask_token)
    seen += calls.seen("target_index", targets)
    if positions is not None:
        seen += calls.seen("positions", positions)
    if _check(packed, backend, *seen) and mask_token.dim() > 1:
        mask_token = mask_token.reshape(-1)
    offsets = []
    if context_offsets is not None and target_offsets is not None:
        offsets = [
            checks.offsets("context_offsets", context_offsets, None, context.shape[0], context)
        ]
        batch = offsets[0].shape[0] - 1
        total = targets.shape[0]
        offsets.append(checks.offsets("target_offsets", target_offsets, batch, total, context))
    name = choose(backend, (context.shape, context.dtype, context.device, context.layout))
    return _assembled(context, context_index, mask_token, targets, positions, offsets, name)


def _assembled(
    context: Tensor,
    context_index: Tensor,
    target: Tensor,
    target_index: Tensor,
    positions: Tensor | None,
    offsets: list[Tensor],
    name: str,
) -> Assembly:
    """The checked arguments, on the backend `name`. offsets: none, or both."""
    whole = offsets[0] + offsets[1] if offsets else None
    wider = torch.promote_types(context_index.dtype, target_index.dtype)
    context_index = context_index.to(wider).contiguous()
    target_index = target_index.to(wider).contiguous()
    if name == "reference":
        if checks.wanted(name, context_index):
            check_order_values(context_index, target_index, *(offsets or (None, None)))
            if positions is not None:
                check_position_values(context_index, target_index, positions)
        args = (context, context_index, target, target_index, positions)
        made = reference.assemble_ragged(*args, *offsets) if offsets else reference.assemble(*args)
        return Assembly(*made, whole)
    direct = calls.direct(context_index, target_index, *offsets)
    run = _order if direct else torch.ops.vicreg_kernels.tokens_order
    index, context_rows, target_rows = run(
        context_index, target_index, *(offsets or (None, None)), name
    )
    # The table and the one mask token are small; they are read in float32.
    table = None if positions is None else positions.float().contiguous()
    dtype = context.dtype
    if target.dim() == 1:
        target = target.float().contiguous()
    elif table is None or target.dtype == dtype:
        target = target.to(dtype)
    else:  # rows of two dtypes: the sums are those of float32, rounded once
        context, target = context.float(), target.float()
    rows = [target_index, index, context_rows, target_rows]
    if offsets:  # places are rows of the packed whole: one sequence
        rows = [z[None] for z in rows]
        target = target if target.dim() == 1 else target[None]
        tokens = _Assemble.apply(context[None], target, table, context_index[None], *rows, name)[0]
    else:
        tokens = _Assemble.apply(context, target, table, context_index, *rows, name)
    return Assembly(tokens.to(dtype), index, context_rows, target_rows, whole)
