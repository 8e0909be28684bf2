"""Variance, invariance and covariance: the VICReg regularisers."""

from vicreg_kernels.vicreg.module import VCRegLoss, VICRegLoss
from vicreg_kernels.vicreg.op import VICRegTerms, variance_covariance, vicreg_loss, vicreg_terms

__all__ = [
    "VCRegLoss",
    "VICRegLoss",
    "VICRegTerms",
    "variance_covariance",
    "vicreg_loss",
    "vicreg_terms",
]
