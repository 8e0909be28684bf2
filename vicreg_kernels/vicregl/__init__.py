"""VICRegL: variance, invariance and covariance of embeddings and of matched feature maps."""

from vicreg_kernels.vicregl.api import VICRegLTerms, vicregl_loss, vicregl_terms
from vicreg_kernels.vicregl.module import VICRegLLoss

__all__ = ["VICRegLLoss", "VICRegLTerms", "vicregl_loss", "vicregl_terms"]
