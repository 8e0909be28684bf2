"""Masks, layouts and the checks of the tokens ops that every tier shares.

A check runs the public function on a backend and on the float64 reference. What only moves rows
must be equal to the last bit; what adds up is held to the rule of tolerances.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tolerances import FEWEST_ROUNDINGS, assert_close_to_truth, differentiate
from vicreg_kernels.tokens import (
    assemble_tokens,
    gather_tokens,
    prediction_loss,
    scatter_tokens,
)

KINDS = ("smooth_l1", "l1", "mse", "cosine")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _contiguous(z: Tensor) -> Tensor:
    return z.contiguous()


def _sliced(z: Tensor) -> Tensor:
    """Rows that begin at no aligned address."""
    return torch.cat([z.new_zeros(*z.shape[:-1], 3), z], -1)[..., 3:]


def _transposed(z: Tensor) -> Tensor:
    return z.mT.contiguous().mT


def _strided(z: Tensor) -> Tensor:
    return torch.stack([z, z], -1).flatten(-2)[..., ::2]


def _batch_last(z: Tensor) -> Tensor:
    return z.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = {f.__name__[1:]: f for f in (_contiguous, _sliced, _transposed, _strided, _batch_last)}


def draw(*shape: int, dtype=torch.float32, device="cpu", layout="contiguous", grad=True) -> Tensor:
    z = LAYOUTS[layout](torch.randn(*shape).to(device, dtype))
    return z.requires_grad_(grad)


@dataclass(frozen=True)
class Mask:
    """An index, [B, K] or packed [R] with offsets."""

    index: Tensor
    offsets: Tensor | None = None

    @property
    def settings(self) -> dict[str, Tensor]:
        return {} if self.offsets is None else {"offsets": self.offsets}


def mask(batch, tokens, kept, dtype=torch.int64, device="cpu", repeat=False, ordered=False) -> Mask:
    """kept: a number, or one for each sample (packed)."""
    counts = [kept] * batch if isinstance(kept, int) else list(kept)

    def one(count: int) -> Tensor:
        several = torch.randint(0, tokens, (count,))
        drawn = several if repeat else torch.randperm(tokens)[:count]
        return drawn.sort().values if ordered else drawn

    rows = [one(count).to(dtype) for count in counts]
    if isinstance(kept, int):
        return Mask(torch.stack(rows).to(device))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return Mask(torch.cat(rows).to(device), offsets.to(device))


def same(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.dtype == expected.dtype, name
    assert torch.equal(actual, expected), f"{name}: {actual} is not {expected}"


def weights(like: Tensor) -> Tensor:
    """An incoming gradient, the same for every backend."""
    count = like.numel()
    values = torch.arange(count, dtype=torch.float64, device=like.device)
    return values.mul(7).remainder(11).sub(5).div(4).reshape(like.shape).to(like.dtype)


def run(function, *leaves: Tensor) -> tuple[Tensor, ...]:
    """A tensor function's value, and its gradients for a fixed incoming gradient."""
    value = function(*leaves)
    wanted = [z for z in leaves if z.requires_grad]
    return value.detach(), *torch.autograd.grad(value, wanted, weights(value))


def wide(z: Tensor) -> Tensor:
    return z.detach().double().requires_grad_(z.requires_grad)


def close(
    actual: Tensor, truth: Tensor, plain: Tensor, length: int, name: str, floor: float = 0.0
) -> None:
    assert actual.dtype == plain.dtype, name
    if truth.numel():
        rounds = max(length, FEWEST_ROUNDINGS)
        assert_close_to_truth(actual, truth, plain, actual.dtype, rounds, name, floor)


def check_gather(backend: str, x: Tensor, chosen: Mask, repeats: int = 1) -> None:
    def function(x, name=backend):
        return gather_tokens(x, chosen.index, backend=name, **chosen.settings)

    value, grad = run(function, x)
    again = run(function, x)
    same(again[1], grad, "two runs")
    plain = run(lambda x: function(x, "reference"), x)
    truth = run(lambda x: function(x, "reference"), wide(x))
    same(value, plain[0], "gather")
    close(grad, truth[1], plain[1], repeats, "gather's gradient")


def check_scatter(backend: str, tokens: Tensor, chosen: Mask, length: int, fill: float) -> None:
    def function(z, name=backend):
        return scatter_tokens(z, chosen.index, length, fill=fill, backend=name, **chosen.settings)

    results = run(function, tokens)
    expected = run(lambda z: function(z, "reference"), tokens)
    for mine, theirs, name in zip(results, expected, ("scatter", "its gradient"), strict=True):
        same(mine, theirs, name)


def _least_norm(rows: Tensor) -> float:
    return rows.detach().double().norm(dim=-1).min().item()


def check_loss(backend: str, pred, teacher: Tensor, index, **settings) -> None:
    """pred: a tensor or a list of them."""
    preds = [pred] if isinstance(pred, Tensor) else list(pred)

    def function(*preds, name=backend, dtype=None):
        given = preds[0] if isinstance(pred, Tensor) else list(preds)
        held = teacher if dtype is None else teacher.to(dtype)
        return prediction_loss(given, held, index, backend=name, **settings)

    def reference(*preds, dtype=None):
        return function(*preds, name="reference", dtype=dtype)

    outcome = differentiate(function, *preds, cotangents=(3.0,))
    again = differentiate(function, *preds, cotangents=(3.0,))
    plain = differentiate(reference, *preds, cotangents=(3.0,))
    truth = differentiate(
        lambda *p: reference(*p, dtype=torch.float64), *map(wide, preds), cotangents=(3.0,)
    )
    length = teacher.shape[-1]
    assert outcome.values[0].dtype == torch.float32
    # 1 - cos and its gradient are differences that may vanish: a few roundings of their terms
    floors = [0.0] * (1 + len(preds))
    if settings.get("kind") == "cosine":
        eps = 4 * torch.finfo(torch.float32).eps
        floors = [eps, *(3 * eps / _least_norm(p) / (p.numel() // length) for p in preds)]
    close(outcome.values[0], truth.values[0], plain.values[0], length, "loss", floors[0])
    same(again.values[0], outcome.values[0], "two runs")
    for i, grad in enumerate(outcome.gradients):
        if grad is not None:
            same(again.gradients[i], grad, "two runs")
            close(
                grad, truth.gradients[i], plain.gradients[i], length, f"gradient {i}", floors[i + 1]
            )


def check_assembly(
    backend: str,
    context: Tensor,
    kept: Mask,
    token: Tensor,
    wanted: Mask,
    positions: Tensor | None = None,
) -> None:
    offsets = {}
    if kept.offsets is not None:
        offsets = {"context_offsets": kept.offsets, "target_offsets": wanted.offsets}
    leaves = [context, token] + ([] if positions is None else [positions])

    def assembly(name, context, token, table=None):
        return assemble_tokens(
            context, kept.index, token, wanted.index, positions=table, backend=name, **offsets
        )

    mine, theirs = assembly(backend, *leaves), assembly("reference", *leaves)
    fields = ("index", "context_rows", "target_rows") + (() if not offsets else ("offsets",))
    for field in fields:
        same(getattr(mine, field), getattr(theirs, field), field)
    same(mine.tokens.detach(), theirs.tokens.detach(), "tokens")
    taken = mine.targets(mine.tokens.detach(), backend=backend)
    same(taken, theirs.targets(theirs.tokens.detach(), backend="reference"), "targets")

    results = run(lambda *z: assembly(backend, *z).tokens, *leaves)
    plain = run(lambda *z: assembly("reference", *z).tokens, *leaves)
    truth = run(lambda *z: assembly("reference", *z).tokens, *map(wide, leaves))
    rows = wanted.index.numel() + kept.index.numel()
    wanted_names = [
        name
        for name, z in zip(("context", "mask token", "positions"), leaves, strict=False)
        if z.requires_grad
    ]
    for name, a, t, p in zip(wanted_names, results[1:], truth[1:], plain[1:], strict=True):
        close(a, t, p, rows, f"gradient of {name}")


def check_out_of_range(kernels: Any, bad: int, dtype: torch.dtype, dim: int) -> None:
    """What is not checked on a GPU, since it would wait: NaN comes out, nothing else changes."""
    x, index = torch.randn(2, 5, dim), mask(2, 5, 3, dtype=dtype).index
    broken = index.clone()
    broken[1, 1] = bad
    good, gathered = (kernels.gather(x, i, None) for i in (index, broken))
    assert gathered[1, 1].isnan().all()
    good[1, 1] = gathered[1, 1] = 0.0
    same(gathered, good, "gather")
    out = kernels.scatter(good, broken, None, 2, 5, 7.0, False, False)
    expected = kernels.scatter(good, index, None, 2, 5, 7.0, False, False)
    expected[1, index[1, 1].item()] = 7.0
    same(out, expected, "scatter")
    for kind in range(4):
        args = (good, x, broken, None)
        loss, saved = kernels.loss_forward(*args, kind, True, 1.0, 1e-5)
        assert loss.isnan()
        grad = kernels.loss_backward(torch.ones(()), *args, saved, kind, True, 1.0)
        assert grad[1, 1].isnan().all()
        grad[1, 1] = 0.0
        assert grad.isfinite().all()
    order = kernels.order(broken, index, None, None)
    table = torch.randn(5, dim)
    out = kernels.assemble(x[:, :3], broken, order[1], torch.randn(dim), index, order[2], table)
    nan = out.isnan().all(-1)
    assert nan.sum() == 1
    assert nan[1, order[1][1, 1].item()]
