"""timm's vision transformers on this library's attention.

    from vicreg_kernels.integrations.timm import fuse, report, unfuse

    model = fuse(timm.create_model("vit_base_patch16_224"))
    print(report(model))                     # which modules are fused, which are left, and why

`Attention`, `AttentionRope` and `EvaAttention` are fused, with what they have around the attention
itself: norms of queries, keys and of the output, gates, grouped keys, dropout of the output. The
rotation of `AttentionRope` and `EvaAttention` stays timm's, whose angles may be any tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from vicreg_kernels.integrations import modules
from vicreg_kernels.integrations.modules import Kind, Report


def _three(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [B, H, T, d] each; of keys and values there may be fewer heads."""
    groups = getattr(module, "num_kv_groups", 1)
    if module.qkv is None:
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    elif getattr(module, "q_bias", None) is None:
        q, k, v = module.qkv(x).chunk(3, dim=-1)
    else:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        if module.qkv_bias_separate:
            three = module.qkv(x)
            three = three + bias.to(three.dtype)
        else:
            three = F.linear(x, module.qkv.weight, bias)
        q, k, v = three.chunk(3, dim=-1)
    few = module.num_heads // groups
    q, k, v = modules.heads(q, module.num_heads), modules.heads(k, few), modules.heads(v, few)
    return module.q_norm(q), module.k_norm(k), v


def _rotated(module: Any, x: Tensor, rope: Tensor, like: Tensor) -> Tensor:
    """x [B, H, T, d] with all tokens after the prefix turned by timm's angles."""
    prefix, rest = x.tensor_split([module.num_prefix_tokens], dim=2)
    turned = apply_rot_embed_cat(rest, rope, half=getattr(module, "rotate_half", False))
    return torch.cat((prefix.type_as(turned), turned), dim=2).type_as(like)


def _forward(
    module: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """In place of the forward of `Attention`."""
    return _forward_rope(module, x, None, attn_mask, is_causal)


def _forward_rope(
    module: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """In place of the forwards of `AttentionRope` and `EvaAttention`."""
    if dropped := modules.cannot_drop(module):
        raise ValueError(f"attn_drop: {dropped} (unfuse puts the model's own attention back)")
    gate = getattr(module, "gate", None)
    q, k, v = _three(module, x)
    if rope is not None:
        q, k = _rotated(module, q, rope, v), _rotated(module, k, rope, v)
    if k.shape[1] != q.shape[1]:
        k, v = (z.repeat_interleave(module.num_kv_groups, dim=1) for z in (k, v))
    scale = None if module.fused_attn else module.scale
    out = modules.attend(module, q, k, v, attn_mask, causal=is_causal, scale=scale)
    out = module.norm(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    projected: Tensor = module.proj_drop(module.proj(out))
    return projected


def _cannot(module: Any) -> str | None:
    wide = module.proj.in_features // module.num_heads
    return modules.cannot_take(wide) or modules.cannot_drop(module)


def _calls(module: Any, draw: Callable[..., Tensor]) -> list[dict[str, Any]]:
    first = module.q_proj if module.qkv is None else module.qkv
    x = draw(2, 5, first.in_features)
    keep = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    keep[0, ..., 3:] = False
    return [{"x": x}, {"x": x, "attn_mask": keep}, {"x": x, "is_causal": True}]


def _calls_rope(module: Any, draw: Callable[..., Tensor]) -> list[dict[str, Any]]:
    calls = _calls(module, draw)
    width = module.proj.in_features // module.num_heads
    angles = draw(5 - min(module.num_prefix_tokens, 5), width)
    rope = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return [*calls, {"x": calls[0]["x"], "rope": rope}]


_KINDS = {
    Attention.forward: Kind(_forward, _cannot, _calls),
    AttentionRope.forward: Kind(_forward_rope, _cannot, _calls_rope),
    EvaAttention.forward: Kind(_forward_rope, _cannot, _calls_rope),
}


def _kind(module: nn.Module) -> Kind | None:
    """By the class's forward, so that a class that only inherits it is known too."""
    return _KINDS.get(type(module).forward)


def fuse(model: nn.Module) -> nn.Module:
    """Runs the attention of a timm model on `masked_attention`.

    Weights, state dict and the modules' classes stay as they are. Fusing twice is as once; a copy
    of the model, deep or pickled, is fused too. Modules that cannot be fused keep their own
    forward: `report` names them with the reasons, and so does a warning in the log of
    "vicreg_kernels". Before a class of module is fused, its own forward is compared with the fused
    one on a few random tokens, and it is left where they differ.

    Of an attention mask the fused forward takes what says which keys are padding, the same for all
    heads or not, with a causal order or without; boolean, or additive with 0 and -65504 or below.

    Args:
        model: any module. Changed in place and returned. Fuse before torch.compile.

    Raises: ValueError where no module can be fused. Later, in a forward: a ValueError where
        attn_drop is above 0 in training (the model was fused in eval), and a ValueError or
        TypeError for another attention mask.
    """
    return modules.fuse(model, _kind)


def report(model: nn.Module) -> Report:
    """Which attention modules of a model are fused, and why the others are not."""
    return modules.report(model, _kind)


def unfuse(model: nn.Module) -> nn.Module:
    """Takes `fuse` back.

    Args:
        model: what `fuse` returned, or a copy. Changed in place and returned.

    Raises: ValueError where no module is fused.
    """
    return modules.unfuse(model, _kind)
