"""The one table of tolerances, and the comparison that every tier uses.

The rule: with `truth` the op in float64 and `plain` the plain PyTorch formula in the dtype under
test, both on the same inputs,

    |actual - truth| <= 2 |plain - truth| + eps sqrt(length) |truth|

in the 2-norm and in the maximum norm, where eps is the dtype's and `length` the terms of the
reductions that a result goes through. On a handful of numbers the plain formula is now and then
exact by luck, so there one rounding of the inputs, |truth(x (1 +- eps)) - truth(x)|, is allowed
too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN_FACTOR = 2.0
# Relative error of two float64 computations of the same formula, written differently.
SAME_FORMULA = 1e-12
# Relative error of the covariance term and of its gradient when a few dimensions dominate.
CANCELLATION = 1e-4
# Up to this many elements the plain formula's error is luck.
FEW = 4096
# However short the reductions, a result goes through about this many roundings.
FEWEST_ROUNDINGS = 32
# These backends form their products from centred values rounded to the input's dtype, so that for
# half inputs the values too are held to that dtype's eps; the others compute in float32.
HALF_PRODUCTS = ("triton", "cuda")


def value_dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype whose eps bounds the loss and the terms of inputs of `dtype`."""
    return dtype if backend in HALF_PRODUCTS else torch.float32


def assert_close_to_truth(
    actual: Tensor,
    truth: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    length: int,
    name: str,
    floor: float = 0.0,
    nudged: Sequence[Tensor] = (),
) -> None:
    """Assert the rule above.

    floor: an absolute allowance an element, for truths that may be 0.
    nudged: truths at inputs one rounding away.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}"
    assert actual.isfinite().all(), f"{name}: not finite, truth is"
    actual, truth, plain, *nudged = (
        t.detach().double().cpu().flatten() for t in (actual, truth, plain, *nudged)
    )
    eps = torch.finfo(dtype).eps
    for norm in (2, float("inf")):
        error, plain_error, size, *nudges = (
            torch.linalg.vector_norm(t, norm).item()
            for t in (actual - truth, plain - truth, truth, *(near - truth for near in nudged))
        )
        slack = max(nudges, default=0.0) + floor * (actual.numel() ** 0.5 if norm == 2 else 1.0)
        bound = PLAIN_FACTOR * plain_error + eps * length**0.5 * size + slack
        assert error <= bound, (
            f"{name}: {norm}-norm error {error:.3e} > {bound:.3e} "
            f"(plain {plain_error:.3e}, truth {size:.3e}, eps sqrt(length) {eps * length**0.5:.1e})"
        )


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Of the whole, in the 2-norm."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    return (torch.linalg.vector_norm(actual - truth) / torch.linalg.vector_norm(truth)).item()


def column_errors(actual: Tensor, truth: Tensor) -> Tensor:
    """Relative error of each column of [..., N, D], in the 2-norm: [..., D]."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    size = torch.linalg.vector_norm(truth, dim=-2)
    return torch.linalg.vector_norm(actual - truth, dim=-2) / size


@dataclass(frozen=True)
class Outcome:
    """Values of a differentiable function, and its gradients where the input wants one."""

    values: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


def differentiate(
    function: Callable[..., Any],
    *inputs: Tensor,
    cotangents: Sequence[float] = (1.0,),
) -> Outcome:
    """function(*inputs), and the gradient of sum_k cotangents[k] * output k for each input that
    requires one. Inputs keep their strides.
    """
    leaves = [z.detach().requires_grad_(z.requires_grad) for z in inputs]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    wanted = [z for z in leaves if z.requires_grad]
    total = sum(c * out for c, out in zip(cotangents, outputs, strict=False))
    computed = iter(torch.autograd.grad(total, wanted) if wanted else ())
    gradients = tuple(next(computed) if z.requires_grad else None for z in leaves)
    return Outcome(tuple(out.detach() for out in outputs), gradients)


def assert_matches_reference(
    function: Callable[..., Any],
    backend: str,
    *inputs: Tensor,
    cotangents: Sequence[float] = (1.0,),
    name: str = "",
    floor: float = 0.0,
) -> Outcome:
    """Hold function(*inputs, backend=backend) to the rule, value and gradient; return its outcome.

    The reference computes half inputs in float32 and rounds the gradient, so as `plain` it is
    stricter than a formula in half throughout.
    """

    def run(backend: str, views: Sequence[Tensor]) -> Outcome:
        return differentiate(
            lambda *leaves: function(*leaves, backend=backend), *views, cotangents=cotangents
        )

    dtype = inputs[0].dtype
    length = max(inputs[0].shape[-2] + inputs[0].shape[-1], FEWEST_ROUNDINGS)
    computed = value_dtype(backend, dtype)
    wide = [z.detach().double().requires_grad_(z.requires_grad) for z in inputs]
    actual, truth, plain = run(backend, inputs), run("reference", wide), run("reference", inputs)
    eps = torch.finfo(computed).eps if inputs[0].numel() <= FEW else 0.0
    nudged = [run("reference", [near(z, eps) for z in wide]) for near in (_all, _some) if eps]

    def hold(kind: str, dtype: torch.dtype, expected: torch.dtype, floor: float) -> None:
        outcomes = [getattr(outcome, kind) for outcome in (actual, truth, plain, *nudged)]
        for i, (mine, true, formula, *near) in enumerate(zip(*outcomes, strict=True)):
            if mine is None:
                continue
            assert mine.dtype == expected
            what = f"{name} {kind} {i}"
            assert_close_to_truth(mine, true, formula, dtype, length, what, floor, near)

    hold("values", computed, torch.float32, 0.0)
    hold("gradients", dtype, dtype, floor)
    return actual


def _all(z: Tensor, eps: float) -> Tensor:
    """Every element one rounding larger."""
    return (z.detach() * (1.0 + eps)).requires_grad_(z.requires_grad)


def _some(z: Tensor, eps: float) -> Tensor:
    """Each element one rounding up, down or not, by a fixed pattern."""
    signs = torch.arange(z.numel(), device=z.device).reshape(z.shape).mul(7).remainder(5).sub(2)
    return (z.detach() * (1.0 + eps * signs.sign())).requires_grad_(z.requires_grad)
