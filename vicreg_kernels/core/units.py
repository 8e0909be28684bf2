"""What Triton kernels are told of sizes and strides instead of being compiled for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def unit(like: Tensor, sizes: Sequence[int], steps: Sequence[int] = ()) -> int:
    """The elements of 16 bytes of `like`, if they divide every size and every step is 1; else 1.

    A kernel takes sizes and strides in that unit and multiplies them again, which tells Triton that
    16-byte accesses are aligned; so it is compiled for two units at most, not for every mixture of
    sizes that 16 divides and that are 1.
    """
    elements = 16 // like.element_size()
    fits = all(step == 1 for step in steps) and all(size % elements == 0 for size in sizes)
    return elements if fits else 1


def layout(*views: Tensor) -> tuple[str, int, tuple[int, ...]]:
    """(kind, unit, strides) of views [G, N, D] or [N, D] of one shape and dtype.

    kind: "rows" where the elements of a row lie side by side in every view, "columns" where those
    of a column do, else "any". unit: what divides D and all strides but those that are 1. A kernel
    takes both as constants and is specialised on no stride: it is compiled for five at most.
    """
    first, strides = views[0], [view.stride() for view in views]
    if first.dim() == 3 and first.shape[0] == 1:
        strides = [(0, *s[1:]) for s in strides]  # one group has no stride between groups
    flat = tuple(s for each in strides for s in each)
    for kind, along, across in (("rows", -1, -2), ("columns", -2, -1)):
        if all(s[along] == 1 for s in strides):
            wide = (first.shape[-1], *(n for s in strides for n in (*s[:-2], s[across])))
            return kind, unit(first, wide), flat
    return "any", 1, flat
