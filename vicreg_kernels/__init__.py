"""Fused losses and ops for VICReg and the joint-embedding predictive architectures."""

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
    "VCRegLoss",
    "VICRegLoss",
    "VICRegTerms",
    "__version__",
    "variance_covariance",
    "vicreg_loss",
    "vicreg_terms",
]
