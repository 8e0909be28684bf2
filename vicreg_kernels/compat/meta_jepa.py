"""What facebookresearch's ijepa, jepa and vjepa2 call as a function (import name `src`).

Left out, because it stands within their training loops and is no function: the momentum update of
the target encoder and the loss; docs/drop_in.md has the lines for both. Their attention modules
are in `vicreg_kernels.integrations.meta_jepa`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vicreg_kernels.compat import shared
from vicreg_kernels.tokens import gather_tokens

__all__ = ["apply_masks"]

# Where all three define it.
HOMES = {"apply_masks": "src.masks.utils"}


def apply_masks(x: Tensor, masks: Iterable[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
    """The tokens that each mask keeps, `vicreg_kernels.gather_tokens` for each.

    Args:
        x: [B, N, D], float32, bfloat16, float16 or float64.
        masks: M index tensors, int32 or int64, [B, K_m], in [0, N).
        concat: whether to join the results; the masks are then equally large.

    Returns: [M B, K, D], mask-major, in x's dtype; the list of M [B, K_m, D] where not concat.

    Raises: ValueError and TypeError naming the argument, also for masks that are not equally large
        where they are joined, and for a place outside x (on a GPU such a row is NaN, as in
        `gather_tokens`).
    """
    if not isinstance(masks, Iterable):
        raise TypeError(f"masks: got {type(masks).__name__}, takes a list of index tensors")
    with shared.renamed(index="masks"):
        kept = [gather_tokens(x, mask) for mask in masks]
    if not concat:
        return kept
    sizes = [z.shape[1] for z in kept]
    if not kept:
        raise ValueError("masks: got none to join, takes at least one")
    if len(set(sizes)) > 1:
        raise ValueError(
            f"masks: got {sizes} places to join, takes equally many (or concat=False, a list)"
        )
    return torch.cat(kept)
