"""The EMA op in plain PyTorch: the specification of every backend, stochastic rounding included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements that share one Philox draw of 128 bits.
GROUP = 8
_WORD = 0xFFFFFFFF


def update_(
    targets: Sequence[Tensor],
    onlines: Sequence[Tensor],
    shadows: Sequence[Tensor],
    momentum_tensor: Tensor | None,
    momentum: float,
    stochastic: bool,
    seed: int,
    step_tensor: Tensor | None,
    step: int,
) -> None:
    """target <- momentum target + (1 - momentum) online; shadow <- target as it is stored.

    A tensor of momentum or step, where there is one, takes the number's place. Arguments are
    checked by api.py.
    """
    m = momentum if momentum_tensor is None else momentum_tensor
    now = step if step_tensor is None else step_tensor
    for index, (target, online) in enumerate(zip(targets, onlines, strict=True)):
        result = interpolate(target, online, m)
        if stochastic and target.dtype in (torch.bfloat16, torch.float16):
            _store_stochastic(target, result.float(), seed, now, index)
        else:
            target.copy_(result)
        if shadows:
            shadows[index].copy_(target)


def interpolate(target: Tensor, online: Tensor, momentum: float | Tensor) -> Tensor:
    """Compute base + factor (online - target) in float32 (float64 if either is), rounding each
    operation.

    The base is the nearer end: target with factor 1 - m if 1 - m < 1/2, else online with factor -m.
    At m = 1 and m = 0 the factor is 0, so the result is exactly one of the ends. target + (1 - m)
    (online - target) would miss online by a rounding of the difference.
    """
    wide = torch.float64 if torch.float64 in (target.dtype, online.dtype) else torch.float32
    t, o = target.to(wide), online.to(wide)
    if isinstance(momentum, Tensor):
        m = momentum.double()
        near = 1.0 - m < 0.5
        factor = torch.where(near, 1.0 - m, -m).to(wide)
        return torch.where(near, t, o) + factor * (o - t)
    if 1.0 - momentum < 0.5:
        return t + (o - t) * (1.0 - momentum)
    return o + (o - t) * -momentum


def memory_order(z: Tensor) -> list[int]:
    """Dimensions by falling stride: the order in which elements are numbered."""
    return sorted(range(z.dim()), key=lambda d: -z.stride(d) if z.shape[d] != 1 else 0)


def _store_stochastic(
    target: Tensor, result: Tensor, seed: int, step: int | Tensor, index: int
) -> None:
    order = memory_order(target)
    ordered = target.permute(order)
    values = result.permute(order).reshape(-1)
    random = random_bits(values.numel(), seed, step, index, values.device)
    ordered.copy_(stochastic_round(values, random, target.dtype).reshape(ordered.shape))


def stochastic_round(values: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """values: float32; random: int64 in [0, 2^16). Up (away from 0) with the probability of what
    truncation would drop; what `dtype` holds stays; beyond its largest number lies infinity.
    """
    bits = values.view(torch.int32).long() & _WORD
    sign, size = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = torch.where(size > 0x7F800000, 0x7FC00000, bits + random) >> 16
    else:
        up = size + (random >> 3)  # 13 bits of the mantissa go
        normal = torch.where(up >= 0x47800000, 0x7C00, (up - 0x38000000) >> 13)
        # Below 2^-14 the step is 2^-24 whatever the exponent.
        tiny = size < 0x38800000
        steps = torch.where(tiny, values.abs(), 0.0) * 2.0**24
        rest = ((steps - steps.floor()) * 65536.0).long()
        subnormal = steps.long() + (random < rest).long()
        rounded = sign | torch.where(tiny, subnormal, normal)
        rounded = torch.where(size > 0x7F800000, 0x7E00, rounded)
    return rounded.to(torch.int16).view(dtype)


def random_bits(
    count: int, seed: int, step: int | Tensor, index: int, device: torch.device
) -> Tensor:
    """16 random bits for each of `count` elements of tensor `index`: int64 [count].

    Philox4x32-10 of key `seed` and counter (group, group >> 32 | step >> 32 << 16, index, step),
    32 bits each, for each group of 8 elements; an element takes half a word, the low half first.
    """
    group = torch.arange(-(-count // GROUP), dtype=torch.int64, device=device)
    high = group >> 32 & 0xFFFF | (step >> 32 & 0xFFFF) << 16
    zero = torch.zeros_like(group)
    words = philox((group & _WORD, high, zero + index, zero + (step & _WORD)), seed)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).reshape(-1)[:count]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011); words as int64 in [0, 2^32)."""
    x, y, z, w = counter
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # int64 products wrap, which leaves both halves of the 64 bits right
        first, second = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = (
            (second >> 32 & _WORD) ^ y ^ key0,
            second & _WORD,
            (first >> 32 & _WORD) ^ w ^ key1,
            first & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return x, y, z, w
