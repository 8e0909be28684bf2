"""Tokens: gather, scatter, the prediction loss and a predictor's sequence."""

from vicreg_kernels.tokens.assembly import Assembly, assemble_tokens
from vicreg_kernels.tokens.loss import prediction_loss
from vicreg_kernels.tokens.module import PredictionLoss
from vicreg_kernels.tokens.rows import gather_tokens, scatter_tokens

__all__ = [
    "Assembly",
    "PredictionLoss",
    "assemble_tokens",
    "gather_tokens",
    "prediction_loss",
    "scatter_tokens",
]
