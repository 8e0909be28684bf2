"""Hugging Face transformers' models on this library's attention and rotary position.

    from vicreg_kernels.integrations.transformers import fuse

    model = fuse(VJEPA2Model.from_pretrained(...))     # or IJepaModel, or any other ViT

`register` puts the attention function into transformers' own registry under "vicreg_kernels";
`fuse` also selects it for a model, and where the model rotates queries and keys as V-JEPA 2 does,
moves that rotation into the attention kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vicreg_kernels.attention import FrameCausal, KeyPadding, Rope3d, masked_attention
from vicreg_kernels.attention.masks import Rule

NAME = "vicreg_kernels"


def _rule(mask: Tensor | None, causal: bool) -> Rule | None:
    """transformers' mask, [B, 1, 1 or Tq, Tk] boolean or additive, as a rule."""
    padding: Rule | None = None
    if mask is not None:
        if mask.dim() != 4 or 1 not in (mask.shape[1], mask.stride(1)) or mask.shape[2] != 1:
            raise ValueError(
                f"attention_mask: got shape {tuple(mask.shape)}, takes [B, 1, 1, Tk], which keys "
                "are padding; other masks are rules of vicreg_kernels.masked_attention"
            )
        keep = mask if mask.dtype == torch.bool else mask == 0
        padding = KeyPadding(keep[:, 0, 0])
    if not causal:
        return padding
    return FrameCausal(1) if padding is None else padding & FrameCausal(1)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, T, d] each -> ([B, T, H, d], no weights)."""
    if dropout:
        raise ValueError(f"dropout: got {dropout}, takes 0 (set attention dropout to 0)")
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    rope = module.__dict__.get("_fused_rope")
    out = masked_attention(
        query, key, value, mask=_rule(attention_mask, bool(causal)), rope=rope, scale=scaling
    )
    return out.transpose(1, 2), None


def register() -> None:
    """Makes attn_implementation="vicreg_kernels" known to transformers."""
    AttentionInterface.register(NAME, attention_forward)


def _places(self: Any, x: Tensor, masks: Tensor | None = None) -> None:
    """In place of V-JEPA 2's get_position_ids: the rotation that attention_forward applies."""
    side = self.grid_size
    frames = -(-x.shape[1] // (side * side)) if masks is None else self.grid_depth
    self.__dict__["_fused_rope"] = Rope3d((frames, side, side), masks, layout="vjepa2")


def _as_it_is(self: Any, qk: Tensor, pos_ids: Any) -> Tensor:
    """In place of V-JEPA 2's apply_rotary_embeddings."""
    return qk


def fuse(model: nn.Module) -> nn.Module:
    """Selects this library's attention in a transformers model, rotary position included.

    Args:
        model: a transformers PreTrainedModel whose attention goes through its registry. Changed in
            place and returned; weights and state dict stay as they are.
    """
    register()
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if hasattr(module, "apply_rotary_embeddings") and hasattr(module, "get_position_ids"):
            module.get_position_ids = _places.__get__(module)
            module.apply_rotary_embeddings = _as_it_is.__get__(module)
    return model
