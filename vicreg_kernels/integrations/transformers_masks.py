"""The masks that transformers makes for this library's attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask


def make(*, q_length: int, mask_function: Any = None, **rest: Any) -> Tensor | None:
    """transformers' mask function: sdpa's, but for padding alone [B, 1, 1, Tk]."""
    if mask_function is bidirectional_mask_function:
        q_length = 1
    if mask_function is not None:
        rest["mask_function"] = mask_function
    made: Tensor | None = sdpa_mask(q_length=q_length, **rest)
    return made
