"""Inputs of the attention tests by rule, and the comparison that every backend is held to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tolerances import FEWEST_ROUNDINGS, assert_close_to_truth
from vicreg_kernels.attention import (
    Blocks,
    FrameCausal,
    KeyPadding,
    Ragged,
    Rope3d,
    contract,
    masked_attention,
    masks,
    reference,
)
from vicreg_kernels.core import dispatch

# What draw() knows. "ragged_keys": packed, keys with offsets of their own.
RULES = ("lengths", "keep", "ragged", "ragged_keys", "frames", "window", "blocks")
HEAD_DIMS = (16, 32, 40, 64, 80, 88, 128)
LAYOUTS = ("heads", "tokens", "fused_qkv", "strided", "sliced", "expanded")


@dataclass(frozen=True)
class Call:
    """The arguments of masked_attention; q, k, v: [B, H, T, d], or [total, H, d] where ragged."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any = None
    rope: Rope3d | None = None
    scale: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"mask": self.mask, "rope": self.rope, "scale": self.scale}

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def wanting(self, *grads: bool) -> Call:
        """The same with requires_grad of q, k and v set."""
        q, k, v = (x.detach().requires_grad_(g) for x, g in zip(self.inputs, grads, strict=True))
        return replace(self, q=q, k=k, v=v)


def heads(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    *,
    layout: str = "heads",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    size: float = 1.0,
) -> Tensor:
    """Random [B, H, T, d] that lies in memory as `layout` says; drawn on the CPU."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape).mul_(size).to(device=device, dtype=dtype)

    if layout == "tokens":  # as a projection's output is split
        return randn(batch, tokens, heads, dim).transpose(1, 2)
    if layout == "fused_qkv":
        return randn(batch, tokens, 3, heads, dim)[:, :, 1].transpose(1, 2)
    if layout == "strided":
        return randn(batch, 2 * heads, tokens, 3 * dim)[:, ::2, :, ::3]
    if layout == "sliced":  # rows that start at no aligned address
        return randn(batch, heads, tokens + 1, dim + 5)[:, :, 1:, 5:]
    if layout == "expanded":  # every head the same memory
        return randn(batch, 1, tokens, dim).expand(batch, heads, tokens, dim)
    return randn(batch, heads, tokens, dim)


def sample_lengths(batch: int, longest: int) -> list[int]:
    """Random lengths 0 to longest; from two samples on one is full, from three on one is empty."""
    lengths = torch.randint(0, longest + 1, (batch,)).tolist()
    if batch >= 2:
        lengths[-1] = longest
    if batch >= 3:
        lengths[1] = 0
    return lengths


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def draw(
    rules: Collection[str] = (),
    *,
    batch: int = 2,
    heads_: int = 2,
    tokens: int = 37,
    keys: int | None = None,
    dim: int = 32,
    axes: int = 0,
    rope_layout: str = "vjepa2",
    indexed: bool = False,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    tokens_per_frame: int = 7,
    window: int = 2,
    layout: str = "heads",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    size: float = 1.0,
    scale: float | None = None,
) -> Call:
    """A call under a set of RULES, with numbers from torch's generator.

    tokens, keys: of a sample, of the longest one where ragged (unless lengths are given). axes:
    rotary axes, 0 for none; indexed: with places drawn from the grid. size: of q, k and v.
    """
    ragged = "ragged" in rules or "ragged_keys" in rules
    keys = tokens if keys is None or "blocks" in rules or "ragged" in rules else keys
    parts: list[Any] = []
    q_total, k_total, rows = tokens, keys, batch
    if ragged:
        lengths = list(lengths) if lengths is not None else sample_lengths(batch, tokens)
        batch, rows = len(lengths), 1
        key_lengths = lengths if "ragged" in rules else key_lengths
        key_lengths = key_lengths if key_lengths is not None else sample_lengths(batch, keys)
        tokens, keys = max(lengths), max(key_lengths)
        q_total, k_total = sum(lengths), sum(key_lengths)
        own = offsets_of(lengths).to(device)
        other = None if "ragged" in rules else offsets_of(key_lengths).to(device)
        parts.append(Ragged(own, other))
    if "lengths" in rules:
        parts.append(KeyPadding(torch.tensor(sample_lengths(batch, keys), device=device)))
    if "keep" in rules:
        keep = torch.rand(batch, keys) < 0.6
        keep[-1] = False
        keep[0] = True if batch > 2 else keep[0]
        parts.append(KeyPadding(keep.to(device)))
    if "frames" in rules or "window" in rules:
        parts.append(FrameCausal(tokens_per_frame, window if "window" in rules else None))
    if "blocks" in rules:
        least = min(lengths) if ragged and lengths is not None else tokens
        cuts = torch.randint(0, least + 1, (batch, 4)).sort(dim=1).values
        parts.append(Blocks(cuts[:, 0].to(device), cuts.diff(dim=1).to(device)))
    q, k, v = (
        heads(rows, heads_, n, dim, layout=layout, dtype=dtype, device=device, size=size)
        for n in (q_total, k_total, k_total)
    )
    rope = None
    if axes:
        grid = grid_for(max(tokens, keys, 1), axes)
        index = key_index = None
        if indexed:
            index = _index(grid, rows, q_total).to(device)
            key_index = _index(grid, rows, k_total).to(device)
            if q_total == k_total and "ragged_keys" not in rules:
                key_index = None
        if ragged and index is not None:
            index, key_index = index[0], None if key_index is None else key_index[0]
        rope = Rope3d(grid, index, key_index, layout=rope_layout)
    if ragged:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    mask = parts[0] if parts else None
    for part in parts[1:]:
        mask = mask & part
    return Call(q, k, v, mask, rope, scale)


def grid_for(places: int, axes: int) -> tuple[int, ...]:
    """A grid of at least `places`, no two axes alike."""
    edge = max(2, round(places ** (1 / axes)))
    grid = [edge + i for i in range(axes)]
    grid[0] = max(grid[0], -(-places // int(torch.tensor(grid[1:]).prod())))
    return tuple(grid)


def _index(grid: tuple[int, ...], rows: int, tokens: int) -> Tensor:
    """int [rows, tokens]: places of the grid."""
    return torch.randint(0, int(torch.tensor(grid).prod()), (rows, tokens))


def cannot_run(backend: str, call: Call) -> str | None:
    """Why a backend does not take a call, None where it does."""
    q, k = call.q, call.k
    if q.dim() == 3:
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    reason = dispatch.missing(backend, q.device.type, q.dtype)
    rules = masks.resolve(call.mask, q, k)
    return reason or contract.cannot_run(q.dtype, max(rules.max_q, rules.max_k)).get(backend)


def run(backend: str, call: Call, cotangent: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradient of <output, cotangent> for each input that wants one."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in call.inputs]
    out = masked_attention(*leaves, backend=backend, **call.settings)
    wanted = [x for x in leaves if x.requires_grad]
    gradients = iter(torch.autograd.grad(out, wanted, cotangent) if wanted else ())
    return out.detach(), [next(gradients) if x.requires_grad else None for x in leaves]


def hold(
    backend: str, call: Call, cotangent: Tensor | None = None, name: str = ""
) -> tuple[Tensor, list[Tensor | None]]:
    """Hold output and wanted gradients to the rule of tolerances.py; return them.

    The reference computes half inputs in float32 and rounds once, so as `plain` it is stricter than
    a formula in half throughout. A gradient that is 0 by cancellation (a query that sees one key)
    is allowed the rounding of the terms that cancel.
    """
    dtype = call.q.dtype
    if cotangent is None:
        cotangent = torch.randn(call.q.shape).to(call.q)
    wide = replace(
        call, **{n: getattr(call, n).detach().double() for n in ("q", "k", "v")}
    ).wanting(*(x.requires_grad for x in call.inputs))
    actual = run(backend, call, cotangent)
    truth = run("reference", wide, cotangent.double())
    plain = run("reference", call, cotangent)
    length = max(call.k.shape[-2 if call.k.dim() == 4 else 0] + call.q.shape[-1], FEWEST_ROUNDINGS)
    floor = cancellation(call, cotangent)
    names = ("output", *(f"gradient of {x}" for x in "qkv"))
    outcomes = ((out, *grads) for out, grads in (actual, truth, plain))
    for what, mine, true, formula in zip(names, *outcomes, strict=True):
        if mine is None:
            continue
        assert true is not None
        assert formula is not None
        assert mine.dtype == dtype
        assert mine.shape == true.shape
        if mine.numel():
            allowed = 0.0 if what == "output" else floor
            assert_close_to_truth(mine, true, formula, dtype, length, f"{name} {what}", allowed)
    return actual


def cancellation(call: Call, cotangent: Tensor) -> float:
    """Absolute rounding of an element of a gradient whose terms cancel. A key's gradient sums one
    rounding a query, each weighed by about 1 / the keys that the query sees.
    """
    q, k = call.q, call.k
    if q.numel() == 0 or k.numel() == 0:
        return 0.0
    scale = q.shape[-1] ** -0.5 if call.scale is None else abs(call.scale)
    products = cotangent.double().norm(dim=-1).max() * call.v.detach().double().norm(dim=-1).max()
    other = max(x.detach().double().abs().max().item() for x in (q, k))
    if q.dim() == 3:
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    rules = masks.resolve(call.mask, q, k)
    seen = reference.visible(rules, q.shape[2], k.shape[2], q.device).sum(dim=-1).double()
    weights = torch.where(seen > 0, 1.0 / seen, 0.0).square().sum(dim=-1).max().sqrt().item()
    return torch.finfo(q.dtype).eps * scale * products.item() * other * max(1.0, weights)


def hold_past_float32(backend: str, dtype: torch.dtype, exact: bool) -> None:
    """Scores that float32 holds, of products that it does not: right, or NaN unless `exact`.

    A sum that is -inf on its way left its key out of the softmax, here the one with all the weight.
    """
    q, k = torch.zeros(2, 1, 5, 16), torch.zeros(2, 1, 9, 16)
    q[..., :2] = 2.0**84
    k[..., :8, 0] = -(2.0**46)
    k[..., :8, 1] = 2.0**46 * (1.0 + torch.arange(1, 9) / 64)  # scores of 2^122 times 1 to 8
    k[..., 8, 1] = 2.0**39
    v, cotangent = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 5, 16)
    q, k, v, cotangent = (x.to(dtype) for x in (q, k, v, cotangent))
    keep = torch.arange(9) != 7
    for mask, best in ((None, 7), (KeyPadding([4, 4]), 3), (KeyPadding(keep.expand(2, 9)), 6)):
        out, grads = run(backend, Call(q, k, v, mask).wanting(True, True, True), cotangent)
        right = torch.equal(out, v[:, :, [best]].expand_as(out))
        assert right or (not exact and out.isnan().all()), mask
        assert right or all(grad[:, :, :best].isnan().all() for grad in grads), mask
        if right:
            given = cotangent.float().sum(dim=2).to(dtype)
            torch.testing.assert_close(grads[2][:, :, best], given, rtol=1e-2, atol=1e-2)
    # No score of a query is a float32: nothing is known of its weights, unless it sees no key.
    k[..., 0], k[..., 1] = -(2.0**84), -(2.0**80) * torch.arange(9)
    for mask in (KeyPadding([9, 0]), KeyPadding(torch.tensor([[True] * 9, [False] * 9]))):
        out, grads = run(backend, Call(q, k, v, mask).wanting(True, True, True), cotangent)
        for result in (out, *grads):
            assert result[0].isnan().all(), mask
            assert not result[1].any(), mask
