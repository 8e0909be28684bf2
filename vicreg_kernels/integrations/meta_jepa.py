"""The encoders and predictors of facebookresearch's ijepa, jepa and vjepa2 on this library's
attention and rotary position.

    from vicreg_kernels.integrations.meta_jepa import fuse, report, unfuse

    encoder = fuse(vit_large(...))           # of src.models.vision_transformer
    print(report(encoder))                   # which modules are fused, which are left, and why

A module is known by the name of its class and the parameters of its forward, since those
repositories are no packages: all three call themselves `src`, and projects hold copies of them
under other names. Many a ViT has a class called Attention; so its own forward and the fused one are
compared on a few random tokens before a class is fused.

Attention maps are never made: where the published forward returns one beside the output (I-JEPA's
always, V-JEPA's without sdpa), the fused one returns None. `apply_masks` is in
`vicreg_kernels.compat.meta_jepa`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_kernels.attention import Rope3d
from vicreg_kernels.compat import shared
from vicreg_kernels.integrations import modules
from vicreg_kernels.integrations.modules import Kind, Report

# Frames of a grid where a call gives places and no number of frames.
_FRAMES = 4096


def _self_attention(
    module: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    rope: Rope3d | None = None,
    frame: int = 1,
) -> Tensor:
    """x [B, T, D] -> [B, T, D]. With sdpa the published forward knows a causal order and no scale
    of its own, without it the other way round.
    """
    sdpa = attn_mask is not None or getattr(module, "use_sdpa", False)
    if not sdpa and (dropped := modules.cannot_drop(module)):
        raise ValueError(f"attn_drop: {dropped} (unfuse puts the model's own attention back)")
    q, k, v = (modules.heads(z, module.num_heads) for z in module.qkv(x).chunk(3, dim=-1))
    causal = sdpa and getattr(module, "is_causal", False)
    scale = None if sdpa else module.scale
    settings = {"causal": causal, "scale": scale, "rope": rope, "frame": frame}
    out: Tensor = module.proj(modules.attend(module, q, k, v, attn_mask, **settings))
    return module.proj_drop(out)


def _with_map(module: Any, x: Tensor, mask: Any = None) -> tuple[Tensor, None]:
    """In place of the Attention of ijepa and of jepa."""
    return _self_attention(module, x), None


def _without_map(module: Any, x: Tensor, mask: Any = None, attn_mask: Any = None) -> Tensor:
    """In place of the Attention of vjepa2."""
    return _self_attention(module, x, attn_mask)


def _rope(
    module: Any,
    x: Tensor,
    mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    T: int | None = None,
    H_patches: int | None = None,
    W_patches: int | None = None,
) -> Tensor:
    """In place of RoPEAttention. mask: places in the grid, int [B, N]."""
    side, tokens = module.grid_size, x.shape[1]
    height, width = side, side
    wanted = tokens // (side * side) * side * side
    if H_patches is not None and W_patches is not None:
        height, width = H_patches, W_patches
        if T is not None:
            wanted = T * height * width
    if mask is None and wanted != tokens:
        raise ValueError(f"x: got {tokens} tokens, takes {wanted}, those of its grid, or a mask")
    frames = -(-tokens // (height * width))
    if mask is not None:
        frames = _FRAMES if T is None else T
    with shared.renamed(index="mask"):
        rope = Rope3d((frames, height, width), mask)
        return _self_attention(module, x, attn_mask, rope)


def _rope_with_actions(
    module: Any,
    x: Tensor,
    mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    T: int | None = None,
    H: int | None = None,
    W: int | None = None,
    action_tokens: int = 0,
) -> Tensor:
    """In place of ACRoPEAttention: action_tokens before the patches of every frame, which turn by
    the frame alone; rows and columns spread over the grid of grid_size.
    """
    side = module.grid_size
    if T is None or H is None or W is None:
        raise TypeError(f"T, H, W: got {T}, {H}, {W}, takes three ints")
    for name, n in (("H", H), ("W", W)):
        if side % n:
            raise ValueError(f"{name}: got {n}, takes a divisor of grid_size {side}")
    if mask is not None and action_tokens:
        raise ValueError(f"mask: got one with {action_tokens} action tokens, takes None with them")
    place = torch.arange(T * H * W, device=x.device) if mask is None else mask
    frame, row, column = place // (H * W), place % (H * W) // W, place % W
    place = (frame * side + row * (side // H)) * side + column * (side // W)
    if action_tokens:
        first = place.view(T, H * W)[:, :1].expand(T, action_tokens)
        place = torch.cat((first, place.view(T, H * W)), dim=1).flatten()
    with shared.renamed(index="mask"):
        rope = Rope3d((T, side, side), place)
        return _self_attention(module, x, attn_mask, rope, action_tokens + H * W)


def _cross(module: Any, q: Tensor, x: Tensor) -> Tensor:
    """In place of CrossAttention, which has no projection after it."""
    k, v = module.kv(x).chunk(2, dim=-1)
    q, k, v = (modules.heads(z, module.num_heads) for z in (module.q(q), k, v))
    scale = None if module.use_sdpa else module.scale
    return modules.attend(module, q, k, v, None, scale=scale)


def _cannot(module: Any) -> str | None:
    if reason := modules.cannot_take(module.qkv.in_features // module.num_heads):
        return reason
    sdpa = getattr(module, "use_sdpa", False)
    dropped = getattr(module, "proj_drop_prob", 0.0)
    if dropped and (sdpa or hasattr(module, "is_causal")):  # the latter may take sdpa for a mask
        return f"proj_drop_prob is {dropped}, which sdpa drops of attention, in eval too"
    return None if sdpa else modules.cannot_drop(module)


def _cannot_cross(module: Any) -> str | None:
    return modules.cannot_take(module.q.in_features // module.num_heads)


Draw = Callable[..., Tensor]
Calls = list[dict[str, Any]]


def _calls(module: Any, draw: Draw) -> Calls:
    return [{"x": draw(2, 5, module.qkv.in_features)}]


def _calls_masked(module: Any, draw: Draw) -> Calls:
    keep = torch.ones(5, dtype=torch.bool).index_fill(0, torch.tensor([1, 3]), False)
    calls = _calls(module, draw)
    return calls if module.is_causal else [*calls, {**calls[0], "attn_mask": keep[None]}]


def _calls_rope(module: Any, draw: Draw) -> Calls:
    grid = {"T": 2, "H_patches": 2, "W_patches": 3}
    places = torch.tensor([[0, 3, 2 * module.grid_size**2 - 1], [1, 2, module.grid_size**2]])
    width = module.qkv.in_features
    return [{"x": draw(2, 12, width), **grid}, {"x": draw(2, 3, width), "mask": places}]


def _calls_actions(module: Any, draw: Draw) -> Calls:
    side = module.grid_size
    grid = {"T": 2, "H": 1, "W": side, "action_tokens": 2}
    return [{"x": draw(2, 2 * (2 + side), module.qkv.in_features), **grid}]


def _calls_cross(module: Any, draw: Draw) -> Calls:
    width = module.q.in_features
    return [{"q": draw(2, 3, width), "x": draw(2, 5, width)}]


_ROPE_PARAMETERS = ("x", "mask", "attn_mask", "T")
_KINDS = {
    ("Attention", ("x",)): Kind(_with_map, _cannot, _calls),
    ("Attention", ("x", "mask")): Kind(_with_map, _cannot, _calls),
    ("Attention", ("x", "mask", "attn_mask")): Kind(_without_map, _cannot, _calls_masked),
    ("RoPEAttention", (*_ROPE_PARAMETERS, "H_patches", "W_patches")): Kind(
        _rope, _cannot, _calls_rope
    ),
    ("ACRoPEAttention", (*_ROPE_PARAMETERS, "H", "W", "action_tokens")): Kind(
        _rope_with_actions, _cannot, _calls_actions
    ),
    ("CrossAttention", ("q", "x")): Kind(_cross, _cannot_cross, _calls_cross),
}


def _kind(module: nn.Module) -> Kind | None:
    own = type(module)
    if not any(own.__name__ == name for name, _ in _KINDS):
        return None
    return _KINDS.get((own.__name__, tuple(inspect.signature(own.forward).parameters)[1:]))


def fuse(model: nn.Module) -> nn.Module:
    """Runs the attention of a model of ijepa, jepa or vjepa2 on `masked_attention`, the rotation of
    RoPEAttention and ACRoPEAttention inside it.

    Weights, state dict and the modules' classes stay as they are. Fusing twice is as once; a copy
    of the model, deep or pickled, is fused too, such as a target encoder. Modules that cannot be
    fused keep their own forward: `report` names them with the reasons, and so does a warning in the
    log of "vicreg_kernels".

    Of an attn_mask the fused forward takes what says which keys are padding, with a causal order
    or without; in ACRoPEAttention the order of frames.

    Args:
        model: any module. Changed in place and returned. Fuse before torch.compile.

    Raises: ValueError where no module can be fused. Later, in a forward: a ValueError where
        attn_drop is above 0 in training (the model was fused in eval), and a ValueError or
        TypeError for another mask, or tokens that are not the grid's.
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
