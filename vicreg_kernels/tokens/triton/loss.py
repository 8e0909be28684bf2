"""The prediction loss in Triton: one pass over predicted and teacher rows each way.

A program takes rows in turns and keeps a whole row in registers, so that mean, deviations and loss
cost one read of memory: (e + e') D bytes and 13 operations an element a row forward, (2 e + e') D
backward. Programs' sums go to partials that one program adds up in order. GPU times: not measured
yet.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from vicreg_kernels.core.triton.operands import round_if
from vicreg_kernels.core.triton.strides import across, along, row_at
from vicreg_kernels.tokens.triton.rows import SIZES, row_offset, sample_of

LOSS_SIZES = [*SIZES, "pred_each", *(f"s{x}" for x in ("p_g", "p_r", "p_d", "t_b", "t_t", "t_d"))]
# As in csrc/tokens/formula.h.
SMOOTH_L1: tl.constexpr = tl.constexpr(0)
L1: tl.constexpr = tl.constexpr(1)
MSE: tl.constexpr = tl.constexpr(2)
COSINE: tl.constexpr = tl.constexpr(3)
LEAST_NORM: tl.constexpr = tl.constexpr(1e-8)


@triton.jit
def element_loss(d, beta, inverse_beta, KIND: tl.constexpr):
    size = tl.abs(d)
    if KIND == MSE:
        return d * d
    elif KIND == L1:
        return size
    else:
        return tl.where(size < beta, d * d * (0.5 * inverse_beta), size - 0.5 * beta)


@triton.jit
def element_slope(d, beta, inverse_beta, KIND: tl.constexpr):
    if KIND == MSE:
        return d + d
    elif KIND == L1:
        return tl.where(d < 0.0, -1.0, tl.where(d > 0.0, 1.0, 0.0))
    else:
        return tl.where(d < -beta, -1.0, tl.where(d > beta, 1.0, d * inverse_beta))


@triton.jit
def load_rows(
    row, column, inside, pred, teacher, index, offsets, length, batch, each, steps, pred_each,
    sp_g, sp_r, sp_d, st_b, st_t, st_d,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Both rows in float32, and whether the index names a token."""
    token = tl.load(index + row).to(tl.int64)
    valid = (token >= 0) & (token < length)
    sample = sample_of(row, offsets, batch, each, steps)
    wide = column.to(tl.int64)
    offset = sample * across(st_b, UNIT) + tl.where(valid, token, 0) * across(st_t, UNIT)
    at = row_at(teacher, offset, UNIT)
    t = tl.load(at + wide * along(st_d, UNIT), mask=inside, other=0.0).to(tl.float32)
    offset = row_offset(row, pred_each, across(sp_g, UNIT), across(sp_r, UNIT))
    at = row_at(pred, offset, UNIT)
    p = tl.load(at + wide * along(sp_d, UNIT), mask=inside, other=0.0).to(tl.float32)
    return p, t, valid


@triton.jit(
    do_not_specialize=["rows", *LOSS_SIZES], do_not_specialize_on_alignment=["pred", "teacher"]
)
def loss_kernel(
    pred, teacher, index, offsets, saved, partials, rows, length, dim, batch, each, steps,
    pred_each, sp_g, sp_r, sp_d, st_b, st_t, st_d, beta, inverse_beta, eps,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[program] = its rows' sum; saved as contract.py says. dim and strides: in UNITs."""
    dim *= UNIT
    beta = tl.cast(beta, tl.float32)
    inverse_beta = tl.cast(inverse_beta, tl.float32)
    eps = tl.cast(eps, tl.float32)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    total = tl.zeros((1,), tl.float64)
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        p, t, valid = load_rows(
            row, column, inside, pred, teacher, index, offsets, length, batch, each, steps,
            pred_each, sp_g, sp_r, sp_d, st_b, st_t, st_d, UNIT,
        )  # fmt: skip
        mean = 0.0
        rstd = 1.0
        if NORMALIZE:
            mean = tl.sum(t, axis=0) / dim
            deviation = tl.where(inside, t - mean, 0.0)
            square = tl.sum(deviation * deviation, axis=0) / dim + eps
            # As inverse_deviation in csrc/tokens/formula.h; infinity less itself is NaN.
            rstd = 1.0 / tl.sqrt(square) + (square - square)
            rstd = tl.where(square < 1.17549435e-38, float("nan"), rstd)
        z = tl.where(inside, (t - mean) * rstd, 0.0)
        unknown = float("nan")
        if KIND == COSINE:
            p_norm = tl.sqrt(tl.sum(p * p, axis=0))
            # Infinity less itself is NaN: of squares past float32 the cosine is unknown, and not 0.
            p_safe = tl.where(p_norm < LEAST_NORM, LEAST_NORM, p_norm) + (p_norm - p_norm)
            z_norm = tl.sqrt(tl.sum(z * z, axis=0))
            z_safe = tl.where(z_norm < LEAST_NORM, LEAST_NORM, z_norm) + (z_norm - z_norm)
            cosine = tl.sum(p * z, axis=0) / p_safe / z_safe
            part = 1.0 - cosine
            own = saved + row * 4
            tl.store(own + 2, -1.0 / p_safe / z_safe)
            tl.store(own + 3, tl.where(p_norm < LEAST_NORM, 0.0, cosine / p_safe / p_safe))
        else:
            d = p - z
            part = tl.sum(tl.where(inside, element_loss(d, beta, inverse_beta, KIND), 0.0), axis=0)
            own = saved + row * 2
        tl.store(own, tl.where(valid, mean, unknown))
        tl.store(own + 1, tl.where(valid, rstd, unknown))
        total += tl.where(valid, part, unknown).to(tl.float64)
    tl.store(partials + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit(do_not_specialize=LOSS_SIZES, do_not_specialize_on_alignment=["pred", "teacher"])
def gradient_kernel(
    grad, pred, teacher, index, offsets, saved, out, length, dim, batch, each, steps, pred_each,
    sp_g, sp_r, sp_d, st_b, st_t, st_d, beta, inverse_beta, scale,
    KIND: tl.constexpr, UNIT: tl.constexpr, ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a row; out is contiguous. scale: 1 over the number of terms."""
    dim *= UNIT
    beta = tl.cast(beta, tl.float32)
    inverse_beta = tl.cast(inverse_beta, tl.float32)
    factor = tl.load(grad) * tl.cast(scale, tl.float32)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    row = tl.program_id(0).to(tl.int64)
    p, t, valid = load_rows(
        row, column, inside, pred, teacher, index, offsets, length, batch, each, steps, pred_each,
        sp_g, sp_r, sp_d, st_b, st_t, st_d, UNIT,
    )  # fmt: skip
    own = saved + row * (4 if KIND == COSINE else 2)
    mean = tl.load(own)
    rstd = tl.load(own + 1)
    z = (t - mean) * rstd
    # L1's slope is a sign, 0 for NaN: of a target that finite numbers leave unknown it is NaN.
    factor += tl.where(mean - mean == 0.0, rstd - rstd, 0.0)
    if KIND == COSINE:
        slope = tl.load(own + 2) * z + tl.load(own + 3) * p
    else:
        slope = element_slope(p - z, beta, inverse_beta, KIND)
    slope = tl.where(valid, slope * factor, float("nan"))
    tl.store(out + row * dim + column, round_if(slope, out, ROUND), mask=inside)
