"""Frame by frame prediction of a teacher's embeddings (causal.py)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vicreg_jepa.methods.causal import Causal
from vicreg_jepa.methods.ijepa import IJEPA


class CausalVJEPA(Causal, IJEPA):
    """Predicts the teacher's embeddings."""

    kind = "mse"

    def present(self, x: Tensor, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:])
