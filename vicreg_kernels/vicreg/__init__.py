"""Variance, invariance and covariance: the VICReg regularisers."""

from vicreg_kernels.vicreg.api import VICRegTerms, variance_covariance, vicreg_loss, vicreg_terms
from vicreg_kernels.vicreg.module import VCRegLoss, VICRegLoss

__all__ = [
    "VCRegLoss",
    "VICRegLoss",
    "VICRegTerms",
    "variance_covariance",
    "vicreg_loss",
    "vicreg_terms",
]
