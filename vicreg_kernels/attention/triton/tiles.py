"""Tiles of heads in Triton: loading, storing, and the operands of the matrix products.

A head dim is held as one power of two, or as two where that wastes less: 80 = 64 + 16 takes 80
columns where one tile would take 128, 60 % more products. The narrow part runs at about half rate
in p v (a wgmma of 16 columns is bound by its other operand), so it costs as 96 would, still a
quarter less. What a head dim takes: 16 32 64 128 as they are, 24 -> 32, 40 and 48 -> 32 + 16,
56 -> 64, 72 and 80 -> 64 + 16, 88 and 96 -> 64 + 32, 104 and more -> 128.

FORMAT "bf16 in fp32" is the interpreter's: it multiplies the bit patterns of bfloat16, so there the
same numbers are kept in float32.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vicreg_kernels.core.triton.operands import narrow, round_to

# Arguments of the kernels that differ from call to call and whose value no instruction depends on.
# Specialised (equal to 1, a multiple of 16), they doubled the compilations one by one. What wide
# loads do need to know of strides comes as one flag, ALIGNED.
VARYING = (
    "samples", "heads", "tokens", "all_keys", "rows", "tiles", "bounds_stride", "blocks", "frame",
    "window", "length_stride", "q_indexed", "q_index_stride", "k_indexed", "k_index_stride",
    "indexed", "index_stride", "frames", "height", "width", "last", "axes", "part", "adjoint",
    "q_offsets", "k_offsets", "offsets", "lengths", "keep", "bounds", "q_index", "k_index", "index",
    *(f"s{x}_{axis}" for x in "qkvgx" for axis in "bhtd"),
)  # fmt: skip


def aligned(*heads: Tensor) -> bool:
    """Whether the elements of every head lie side by side, at multiples of 8 from one another.

    A dimension of one element may have any stride.
    """
    return all(
        x.stride(3) == 1
        and all(n == 1 or s % 8 == 0 for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
        for x in heads
    )


@triton.jit
def strides(b, h, t, d, ALIGNED: tl.constexpr):
    """The strides of [B, H, T, d], in a form that shows what `aligned` says of them."""
    if ALIGNED:
        return b // 8 * 8, h // 8 * 8, t // 8 * 8, 1
    else:
        return b, h, t, d


def parts(head_dim: int, operands: str = "bf16") -> tuple[int, int]:
    """Columns of the two tiles of a head, the second 0 where one does.

    float32 operands are split into two tf32 that stay in registers: two tiles of them spill, so
    they take one.
    """
    whole = triton.next_power_of_2(head_dim)
    if whole == head_dim or operands in ("fp32", "tf32"):
        return whole, 0
    first = whole // 2
    second = max(16, triton.next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole else (whole, 0)


@triton.jit
def load_part(
    base, along, live, stride,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of rows at base + along [R]; 0 past the head dim, and, if
    MASKED, in rows that are not live.
    """
    column = FIRST + tl.arange(0, WIDTH)
    at = base + (along[:, None] + column.to(tl.int64)[None, :] * stride)
    inside = (column < HEAD)[None, :]
    if FIRST + WIDTH > HEAD:
        if MASKED:
            return tl.load(at, mask=live[:, None] & inside, other=0.0)
        else:
            return tl.load(at, mask=inside, other=0.0)
    elif MASKED:
        return tl.load(at, mask=live[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def loaded(x, FORMAT: tl.constexpr):
    """An input's tile as a product takes it."""
    return x.to(tl.float32) if FORMAT == "bf16 in fp32" else x


@triton.jit
def load_rows(
    base, start, stride_t, stride_d, live,
    MASKED: tl.constexpr, HEAD: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Both parts (the second is the first where there is one) of ROWS rows from `start` on."""
    base += tl.cast(start, tl.int64) * stride_t
    along = tl.arange(0, ROWS).to(tl.int64) * stride_t
    x1 = loaded(load_part(base, along, live, stride_d, 0, D1, HEAD, MASKED), FORMAT)
    x2 = x1
    if D2:
        x2 = loaded(load_part(base, along, live, stride_d, D1, D2, HEAD, MASKED), FORMAT)
    return x1, x2


@triton.jit
def store_part(base, along, live, x, FIRST: tl.constexpr, HEAD: tl.constexpr, FORMAT: tl.constexpr):
    """x: float32 [R, W] to live rows at base + along, columns from FIRST on, side by side."""
    W: tl.constexpr = x.shape[1]
    column = FIRST + tl.arange(0, W)
    at = base + (along[:, None] + column[None, :])
    mask = live[:, None]
    if FIRST + W > HEAD:
        mask = mask & (column < HEAD)[None, :]
    tl.store(at, narrow(x, base, FORMAT), mask=mask)


@triton.jit
def rounded(x, FORMAT: tl.constexpr):
    """A float32 tile as a product takes it."""
    if FORMAT == "bf16":
        return x.to(tl.bfloat16)
    elif FORMAT == "bf16 in fp32":
        return round_to(x, 65537.0)
    elif FORMAT == "fp16":
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def product(a1, a2, b1, b2, TWO: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the head dim, in its one or two parts."""
    s = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if TWO:
        s = tl.dot(a2, tl.trans(b2), s, input_precision=PRECISION)
    return s
