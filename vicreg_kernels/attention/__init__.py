"""Masked attention, its rules, and rotary position."""

from vicreg_kernels.attention.api import apply_rope, masked_attention
from vicreg_kernels.attention.masks import Blocks, FrameCausal, KeyPadding, Ragged
from vicreg_kernels.attention.module import MaskedAttention
from vicreg_kernels.attention.rope import Rope3d

__all__ = [
    "Blocks",
    "FrameCausal",
    "KeyPadding",
    "MaskedAttention",
    "Ragged",
    "Rope3d",
    "apply_rope",
    "masked_attention",
]
