"""What Triton kernels are told of sizes and strides instead of being compiled for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def unit(
    like: Tensor, sizes: Sequence[int], steps: Sequence[int] = (), begins: Sequence[Tensor] = ()
) -> int:
    """The elements of 16 bytes of `like`, if they divide every size, every step is 1 and each of
    `begins` begins at a multiple of 16 bytes; else 1.

    A kernel takes sizes and strides in that unit and multiplies them again, which tells Triton that
    16-byte accesses are aligned; so it is compiled for two units at most, not for every mixture of
    sizes that 16 divides and that are 1, or of addresses (row_at in core/triton/strides.py).
    """
    elements = 16 // like.element_size()
    fits = (
        all(step == 1 for step in steps)
        and all(size % elements == 0 for size in sizes)
        and all(z.data_ptr() % 16 == 0 for z in begins)
    )
    return elements if fits else 1
