"""Fused losses and ops for VICReg and the joint-embedding predictive architectures."""

from vicreg_kernels.attention import (
    Blocks,
    FrameCausal,
    KeyPadding,
    MaskedAttention,
    Ragged,
    Rope3d,
    apply_rope,
    masked_attention,
)
from vicreg_kernels.version import __version__
from vicreg_kernels.vicreg import (
    VCRegLoss,
    VICRegLoss,
    VICRegTerms,
    variance_covariance,
    vicreg_loss,
    vicreg_terms,
)

__all__ = [
    "Blocks",
    "FrameCausal",
    "KeyPadding",
    "MaskedAttention",
    "Ragged",
    "Rope3d",
    "VCRegLoss",
    "VICRegLoss",
    "VICRegTerms",
    "__version__",
    "apply_rope",
    "masked_attention",
    "variance_covariance",
    "vicreg_loss",
    "vicreg_terms",
]
