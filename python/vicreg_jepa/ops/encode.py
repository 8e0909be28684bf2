"""Runs an encoder and a predictor on some of the tokens, with fused or reference ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicreg_jepa.models.masks import Masks, Places
from vicreg_jepa.ops.choose import Kernels
from vicreg_jepa.ops.common import Sequences


def encode(encoder: Any, kernels: Kernels, x: Tensor, places: Places | None) -> Any:
    """Run the encoder on the tokens at `places` and return Sequences; None: on all tokens, [B, T,
    D].
    """
    tokens = encoder.embed(x)
    if places is None:
        return encoder.run(tokens, kernels.attend(None, encoder.rope, encoder.apart))
    seen = kernels.take(tokens, places)
    return seen.with_tokens(encoder.run(seen.x, kernels.attend(seen, encoder.rope, encoder.apart)))


def predict(predictor: Any, kernels: Kernels, context: Sequences, masks: Masks) -> Tensor:
    """Predict the embeddings of the targets, in the form that `prediction_loss` takes."""
    narrow = context.with_tokens(predictor.predictor_embed(context.x))
    sequence = kernels.assemble(narrow, predictor.mask_token, masks.targets, predictor.table)
    x = predictor.run(sequence.x, kernels.attend(sequence, predictor.rope))
    return predictor.predictor_proj(kernels.predictions(sequence.with_tokens(x)))
