"""Hugging Face transformers' models on this library's attention and rotary position.

    from vicreg_kernels.integrations.transformers import fuse

    model = fuse(VJEPA2Model.from_pretrained(...))     # or IJepaModel, or any other ViT

`register` puts the attention function and its masks into transformers' own registries under
"vicreg_kernels"; `fuse` also selects it for a model, and where the model rotates queries and keys
as V-JEPA 2 does, moves that rotation into the attention kernel; `unfuse` takes both back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from vicreg_kernels.attention import Rope3d
from vicreg_kernels.integrations import masks, modules, transformers_masks

NAME = "vicreg_kernels"
# Of transformers' keywords, those that change the result and are not computed here.
_REFUSED = ("position_bias", "softcap", "s_aux", "head_mask")
_ROPE, _BEFORE = "_fused_rope", "_attention_before_fuse"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, T, d] each -> ([B, T, H, d], no weights).

    attention_mask: broadcasts to [B, H, Tq, Tk]; boolean, True for a key that is seen, or additive,
    0 or -65504 and below. It may say which keys are padding, the same for all heads or not, and a
    causal order. As with transformers' own "sdpa", is_causal counts where there is no mask and more
    than one query.

    Raises a ValueError or TypeError where a mask says anything else, such as a finite bias, and for
    what the kernels do not compute: dropout, a position bias, soft capping, sinks, attention maps.
    """
    if dropout:
        raise ValueError(f"dropout: got {dropout}, takes 0 (set attention dropout to 0)")
    for name in _REFUSED:
        if others.get(name) is not None:
            raise ValueError(
                f"{name}: got one, takes None; where the model has one, "
                "set_attn_implementation('eager') takes it"
            )
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions: got True, takes False: attention maps are never made; "
            "set_attn_implementation('eager') makes them"
        )
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, takes four dimensions"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = masks.attend(
        query,
        key,
        value,
        attention_mask,
        causal=causal and query.shape[2] > 1,
        rope=module.__dict__.pop(_ROPE, None),
        scale=scaling,
        name="attention_mask",
    )
    return out.transpose(1, 2), None


def register() -> None:
    """Makes attn_implementation="vicreg_kernels" known to transformers: the function, and its
    masks, without which transformers passes none.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, transformers_masks.make)


def _places(module: Any, x: Tensor, masks: Tensor | None = None) -> Any:
    """In place of V-JEPA 2's get_position_ids. None: attention_forward rotates."""
    if module.config._attn_implementation != NAME:
        module.__dict__.pop(_ROPE, None)
        return type(module).get_position_ids(module, x, masks)
    side = module.grid_size
    frames = -(-x.shape[1] // (side * side)) if masks is None else module.grid_depth
    module.__dict__[_ROPE] = Rope3d((frames, side, side), masks, layout="vjepa2")
    return None


def _turned(module: Any, qk: Tensor, pos_ids: Any) -> Tensor:
    """In place of V-JEPA 2's apply_rotary_embeddings."""
    if pos_ids is None:
        return qk
    turned: Tensor = type(module).apply_rotary_embeddings(module, qk, pos_ids)
    return turned


_METHODS: dict[str, Callable[..., Any]] = {
    "get_position_ids": _places,
    "apply_rotary_embeddings": _turned,
}


def fuse(model: nn.Module) -> nn.Module:
    """Selects this library's attention in a transformers model, rotary position included.

    Where another implementation is set later (`set_attn_implementation`), the model rotates as it
    did before; `unfuse` also takes the methods back.

    Args:
        model: a transformers PreTrainedModel whose attention goes through its registry. Changed in
            place and returned; weights and state dict stay as they are.

    Raises: ValueError where the model's attention does not go through the registry.
    """
    before = _implementations(model)
    register()
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"model: got {type(model).__name__}, whose attention does not go through transformers' "
            "registry, takes one whose does"
        )
    model.__dict__.setdefault(_BEFORE, before)
    for module in model.modules():
        if all(hasattr(type(module), name) for name in _METHODS):
            modules.put(module, _METHODS)
    return model


def _implementations(model: Any) -> str | dict[str, Any]:
    """What `set_attn_implementation` takes to set what is set now."""
    config = model.config
    parts = {
        name: part._attn_implementation
        for name in getattr(config, "sub_configs", {})
        if (part := getattr(config, name, None)) is not None
    }
    own: str = config._attn_implementation
    return {"": own, **parts} if parts else own


def unfuse(model: nn.Module, attn_implementation: str | dict[str, Any] | None = None) -> nn.Module:
    """Takes `fuse` back: the model's own rotation, and another attention implementation.

    Args:
        model: what `fuse` returned, or a copy. Changed in place and returned.
        attn_implementation: as transformers' `set_attn_implementation` takes it; None: the one that
            `fuse` found.

    Raises: ValueError where the model is not fused, or where attn_implementation is None and `fuse`
        found this library's.
    """
    if _BEFORE not in model.__dict__:
        raise ValueError(f"model: got {type(model).__name__} that is not fused, takes what is")
    name = model.__dict__[_BEFORE] if attn_implementation is None else attn_implementation
    if attn_implementation is None and NAME in (name, *(name if isinstance(name, dict) else ())):
        raise ValueError(
            f"attn_implementation: got None where fuse found {NAME!r}, takes a name such as 'sdpa'"
        )
    model.set_attn_implementation(name)
    del model.__dict__[_BEFORE]
    for module in model.modules():
        if modules.has(module, _METHODS):
            modules.take_back(module, _METHODS)
            module.__dict__.pop(_ROPE, None)
    return model
