"""Barlow Twins on a batch that several ranks hold: each works on its own rows.

Plain torch products on every device: a rank's share is a rectangular product, a vendor GEMM's
home. With n rows here of N in all and R ranks, a rank does, K1 = Z1 Z1^T and K2 = Z2 Z2^T,

                            exchanges                                 operations
    statistics              4 D + 1 float64, summed                   14 n D
    N < D:   rows           2 n D of the input's dtype, gathered      4 n N D: its rows of K1 and K2
             sums           1 + 3 D float64, summed (1 + D without    4 n N D for the gradient
                            a gradient)
    N >= D:  correlation    D^2 float32, summed, in chunks            2 n D^2
                                                                      4 n D^2 for the gradient

With dL/dC = 2 lambd C off the diagonal and 2 (c - 1) on it, c the diagonal of C = Z1^T Z2 / N, the
gradient at the standardised own rows is

    dZ1 = (2 lambd / N) Z2 C^T + Z2 diag(e) / N,   e = 2 (c - 1) - 2 lambd c,   N Z2 C^T = K2 Z1,

and at the projections, through z = s (x - mean), s = 1 / (std + std_eps),

    dx = s dz - z q / (std degrees),   q_j = sum_n dz_nj z_nj = 2 lambd sum_i C_ji^2 + c_j e_j:

columns of dZ sum to 0 as those of Z do, and q is the one sum over ranks that the gradient needs. It
travels with the loss's own sum, because the forward multiplies for the gradient, too, where one is
needed. So the backward is one multiplication by the incoming gradient and exchanges nothing, and
what is saved is own rows. Half inputs multiply standardised values rounded to half, and what the
Gram side subtracts is made of those very values, as in the cuda backend.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.barlow import reference
from vicreg_kernels.barlow.contract import Settings
from vicreg_kernels.core import dispatch, library, schema
from vicreg_kernels.core.once import once
from vicreg_kernels.distributed import Pending
from vicreg_kernels.distributed.batch_statistics import product, square_product, statistics

OP = "barlow_twins_loss"
# Elements of a chunk of the correlation that is summed over ranks, and its least height.
CHUNK_ELEMENTS = 1 << 20
CHUNK_ROWS = 128
# Chunks on their way at a time.
IN_FLIGHT = 2

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_SETTINGS = f"str convention, str group, {schema.arguments(Settings)}"
_LIBRARY.define(
    f"barlow_ranks_forward(Tensor x, Tensor y, bool need_x, bool need_y, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "barlow_ranks_backward(Tensor grad, Tensor x, Tensor y, Tensor gradient_x, Tensor gradient_y,"
    " bool need_x, bool need_y, str group) -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "barlow_ranks_forward", "CompositeExplicitAutograd")
def _forward(
    x: Tensor, y: Tensor, need_x: bool, need_y: bool, convention: str, group: str, *settings: Any
) -> tuple[Tensor, ...]:
    with library.no_autocast(x.device):
        return forward(x, y, need_x, need_y, convention, group, Settings(*settings))


@torch.library.impl(_LIBRARY, "barlow_ranks_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return backward(grad, *args)


@torch.library.register_fake("vicreg_kernels::barlow_ranks_forward")
def _forward_fake(
    x: Tensor, y: Tensor, need_x: bool, need_y: bool, *settings: Any
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(1, dtype=torch.float32),
        x.new_empty(x.shape if need_x else (0,), dtype=torch.float32),
        x.new_empty(x.shape if need_y else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("vicreg_kernels::barlow_ranks_backward")
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    gradient_x: Tensor,
    gradient_y: Tensor,
    need_x: bool,
    need_y: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))


class _Ranks(torch.autograd.Function):
    """Forward saves the gradient for a cotangent of 1; backward is one op call. Once
    differentiable; the views are saved so that a second derivative finds its way to the error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        need_x: bool,
        need_y: bool,
        convention: str,
        group: str,
        settings: Settings,
    ) -> Tensor:
        loss, *gradients = torch.ops.vicreg_kernels.barlow_ranks_forward(
            x, y, need_x, need_y, convention, group, *settings
        )
        ctx.save_for_backward(x, y, *gradients)
        ctx.group = group
        return loss[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        need_x, need_y = ctx.needs_input_grad[:2]
        args = (grad.reshape(1), *ctx.saved_tensors, need_x, need_y, ctx.group)
        op = torch.ops.vicreg_kernels.barlow_ranks_backward
        grad_x, grad_y = once("Barlow Twins loss", op, *args)
        return (grad_x if need_x else None, grad_y if need_y else None, *(None,) * 5)


def loss(
    x: Tensor, y: Tensor, settings: Settings, backend: str, convention: str, group: str
) -> Tensor:
    """sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2 over the rows of all ranks; 0-d.

    Called by `api.barlow_twins_loss` after its own checks: x, y: own rows, [n, D] of one dtype and
    device, n >= 1, D >= 1. `convention` is the convention's name, for the agreement, and its scale
    is the caller's. backend: "ranks" or "reference". group: the group's name.

    The value is the same on every rank; the gradient is as vicreg_kernels/distributed says.
    """
    if backend == "ranks":
        enabled = torch.is_grad_enabled()
        needs = (enabled and x.requires_grad, enabled and y.requires_grad)
        return _Ranks.apply(x, y, *needs, convention, group, settings)
    rows = agree(x, settings, convention, backend, group)
    x, y = (distributed.gather_differentiable(OP, group, z, rows) for z in (x, y))
    return reference.loss(x, y, *settings.as_reference_takes())


def agree(x: Tensor, settings: Settings, convention: str, backend: str, group: str) -> list[int]:
    """Rows of each rank; all ranks raise where one cannot or would do something else."""
    facts = {
        "D": x.shape[1],
        "dtype": x.dtype,
        "convention": convention,
        "eps": settings.std_eps + settings.eps,
        "unbiased": settings.unbiased,
        "lambd": settings.lambd,
        "backend": backend,
    }
    return distributed.agree(distributed.by_name(group), OP, x.shape[0], facts)


def forward(
    x: Tensor,
    y: Tensor,
    need_x: bool,
    need_y: bool,
    convention: str,
    group: str,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, float32 [1], and its gradient at x and y, float32 [n, D] or empty."""
    eps, std_eps, unbiased, lambd = settings.as_reference_takes()
    rows = agree(x, settings, convention, "ranks", group)
    ranks = distributed.by_name(group)
    total = sum(rows)
    degrees = total - int(unbiased)
    own, _, scatter, _ = statistics(OP, x.unsqueeze(0), y.unsqueeze(0), rows, ranks)
    std = torch.sqrt(scatter[:, 0] / degrees + eps)  # [2, D] float64
    scale = 1.0 / (std + std_eps)
    own = own.squeeze(2).mul_(scale.float().unsqueeze(1)).to(x.dtype)  # Z1, Z2: [2, n, D]
    needs = (need_x, need_y)
    side = _gram if total < x.shape[1] else _correlation
    square, diagonal, sums, products = side(own, needs, rows, ranks)

    on_diagonal = diagonal.square()
    value = (diagonal - 1.0).square().sum() + lambd * (square - on_diagonal.sum())
    slope = 2.0 * (diagonal - 1.0) - 2.0 * lambd * diagonal  # e
    # d std / d scatter is 0 where a constant column has no std, as torch.std has it.
    inverse = torch.where(std == 0, 0.0, 1.0 / (std * degrees))
    gradients = []
    for v in range(2):
        if not needs[v]:
            gradients.append(own.new_empty(0, dtype=torch.float32))
            continue
        q = 2.0 * lambd * sums[v] + diagonal * slope
        out = products[v].mul_((2.0 * lambd / total) * scale[v].float())
        out.addcmul_(own[1 - v], (slope * scale[v] / total).float())
        gradients.append(out.addcmul_(own[v], (q * inverse[v]).float(), value=-1))
    return value.float().reshape(1), gradients[0], gradients[1]


def _gram(
    own: Tensor, needs: tuple[bool, bool], rows: list[int], group: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """||C||^2, diagonal [D] and row and column sums of squares [2, D] of C, float64; N^-1 K2 Z1 and
    N^-1 K1 Z2 at the own rows, float32, or empty. N < D: ||C||^2 = <K1, K2> / N^2.
    """
    _, count, dim = own.shape
    total, longest, rank = sum(rows), max(rows), torch.distributed.get_rank(group)
    mine = slice(rank * longest, rank * longest + count)
    arriving = [distributed.start_gather_rows(OP, group, z, rows) for z in own]
    everyone, gram = [], []
    for v in range(2):
        everyone.append(arriving[v].wait())  # [M, D], M = ranks * longest
        z = everyone[v]
        gram.append(product(z[mine].unsqueeze(0), z.t().unsqueeze(0))[0])  # [n, M]
    needed = [v for v in range(2) if needs[v]]
    packed = torch.zeros(1 + (1 + len(needed)) * dim, dtype=torch.float64, device=own.device)
    packed[0] = (gram[0].double() * gram[1].double()).sum() / total**2
    columns = packed[1:].view(-1, dim)
    columns[0] = (own[0].float() * own[1].float()).sum(dim=0).double() / total
    products = [own.new_empty(0, dtype=torch.float32)] * 2
    for i, v in enumerate(needed):
        products[v] = square_product(gram[1 - v].unsqueeze(0), everyone[v].unsqueeze(0))[0]
        products[v] /= total
        columns[1 + i] = (own[v].float() * products[v]).sum(dim=0).double() / total
    distributed.sum_ranks_(OP, group, packed)
    sums = columns.new_zeros(2, dim)
    for i, v in enumerate(needed):
        sums[v] = columns[1 + i]
    return packed[0], columns[0], sums, products


def _correlation(
    own: Tensor, needs: tuple[bool, bool], rows: list[int], group: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """As `_gram`, N >= D: C itself, summed over ranks by chunks of rows while the next are
    multiplied; Z2 C^T and Z1 C at the own rows.
    """
    dim, total = own.shape[2], sum(rows)
    height = min(dim, max(CHUNK_ROWS, CHUNK_ELEMENTS // dim))
    square = own.new_empty((dim, dim), dtype=torch.float32)
    sums = own.new_zeros((2, dim), dtype=torch.float64)
    flying: deque[tuple[slice, Pending]] = deque()

    def land() -> None:
        where, pending = flying.popleft()
        torch.div(pending.wait()[0], total, out=square[where])
        squares = square[where].double().square()
        sums[0, where] = squares.sum(dim=1)
        sums[1] += squares.sum(dim=0)

    first, second = own.unsqueeze(1).unbind()
    for begin in range(0, dim, height):
        where = slice(begin, min(begin + height, dim))
        part = product(first[..., where].mT, second)  # [1, height, D]
        flying.append((where, distributed.start_sum_ranks_(OP, group, part)))
        if len(flying) > IN_FLIGHT:
            land()
    while flying:
        land()
    products = [own.new_empty(0, dtype=torch.float32)] * 2
    for v, needed in enumerate(needs):
        if needed:  # the square on the left, where its rows can be scaled
            left = square if v == 0 else square.t()
            turned = square_product(left.unsqueeze(0), own[1 - v].t().unsqueeze(0))
            products[v] = turned[0].t().contiguous()
    return sums[0].sum(), square.diagonal().double(), sums, products


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    gradient_x: Tensor,
    gradient_y: Tensor,
    need_x: bool,
    need_y: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    """`ranks` times the whole batch's gradient at x and y, in their dtype, empty where not needed.
    grad: float32 [1], the same on every rank.
    """
    process_group = distributed.by_name(group)
    if dispatch.DEBUG:
        distributed.check_same(OP, process_group, "the loss's incoming gradient", grad)
    factor = grad * torch.distributed.get_world_size(process_group)
    grad_x, grad_y = (
        (gradient * factor).to(z.dtype) if needed else z.new_empty(0)
        for z, gradient, needed in ((x, gradient_x, need_x), (y, gradient_y, need_y))
    )
    return grad_x, grad_y
