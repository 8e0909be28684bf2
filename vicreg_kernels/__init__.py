"""Fused losses and ops for VICReg and the joint-embedding predictive architectures."""

from vicreg_kernels.accumulation import accumulate
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
from vicreg_kernels.ema import EMA, ema_update_
from vicreg_kernels.tokens import (
    Assembly,
    PredictionLoss,
    assemble_tokens,
    gather_tokens,
    prediction_loss,
    scatter_tokens,
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
    "EMA",
    "Assembly",
    "Blocks",
    "FrameCausal",
    "KeyPadding",
    "MaskedAttention",
    "PredictionLoss",
    "Ragged",
    "Rope3d",
    "VCRegLoss",
    "VICRegLoss",
    "VICRegTerms",
    "__version__",
    "accumulate",
    "apply_rope",
    "assemble_tokens",
    "ema_update_",
    "gather_tokens",
    "masked_attention",
    "prediction_loss",
    "scatter_tokens",
    "variance_covariance",
    "vicreg_loss",
    "vicreg_terms",
]
