"""Fused losses and ops for VICReg and the joint-embedding predictive architectures."""

from vicreg_kernels.accumulation import accumulate
from vicreg_kernels.adaln import AdaLN, gated_residual, modulated_layer_norm
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
from vicreg_kernels.barlow import BarlowTwinsLoss, barlow_twins_loss
from vicreg_kernels.compat.patching import patch, unpatch
from vicreg_kernels.ema import EMA, ema_update_
from vicreg_kernels.projector import Projector
from vicreg_kernels.sigreg import LeJEPALoss, SIGRegLoss, sigreg_directions, sigreg_loss
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
from vicreg_kernels.vicregl import VICRegLLoss, VICRegLTerms, vicregl_loss, vicregl_terms

__all__ = [
    "EMA",
    "AdaLN",
    "Assembly",
    "BarlowTwinsLoss",
    "Blocks",
    "FrameCausal",
    "KeyPadding",
    "LeJEPALoss",
    "MaskedAttention",
    "PredictionLoss",
    "Projector",
    "Ragged",
    "Rope3d",
    "SIGRegLoss",
    "VCRegLoss",
    "VICRegLLoss",
    "VICRegLTerms",
    "VICRegLoss",
    "VICRegTerms",
    "__version__",
    "accumulate",
    "apply_rope",
    "assemble_tokens",
    "barlow_twins_loss",
    "ema_update_",
    "gated_residual",
    "gather_tokens",
    "masked_attention",
    "modulated_layer_norm",
    "patch",
    "prediction_loss",
    "scatter_tokens",
    "sigreg_directions",
    "sigreg_loss",
    "unpatch",
    "variance_covariance",
    "vicreg_loss",
    "vicreg_terms",
    "vicregl_loss",
    "vicregl_terms",
]
