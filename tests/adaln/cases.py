"""Tensors, layouts and the check of adaptive layer norm that every tier shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tolerances import FEWEST_ROUNDINGS, assert_close_to_truth
from vicreg_kernels.adaln import gated_residual, modulated_layer_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (x's dtype, y's, that of the vectors): all of one, and what autocast makes.
MIXES = [
    (torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float16,) * 3,
    (torch.float32, torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32), (torch.float16, torch.float16, torch.bfloat16),
]  # fmt: skip
FORMS = ("frame", "frame of one", "token")
# The leading dimensions and T, then D: one of everything, odd ones, a frame of several CPU tasks.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 3, 4, 16), (5, 33), (2, 1, 1, 40), (2, 300, 9), (3, 4, 130)]


def _contiguous(z: Tensor) -> Tensor:
    return z.contiguous()


def _sliced(z: Tensor) -> Tensor:
    """Rows that begin at no aligned address."""
    return torch.cat([z.new_zeros(*z.shape[:-1], 3), z], -1)[..., 3:]


def _transposed(z: Tensor) -> Tensor:
    return z.mT.contiguous().mT


def _strided(z: Tensor) -> Tensor:
    return torch.stack([z, z], -1).flatten(-2)[..., ::2]


def _frames_last(z: Tensor) -> Tensor:
    return z.transpose(0, 1).contiguous().transpose(0, 1)


def _expanded(z: Tensor) -> Tensor:
    """Every frame the same memory."""
    return z[:1].expand(z.shape)


LAYOUTS = {
    f.__name__[1:]: f
    for f in (_contiguous, _sliced, _transposed, _strided, _frames_last, _expanded)
}


def draw(*shape: int, dtype=torch.float32, device="cpu", layout="contiguous", grad=True) -> Tensor:
    return LAYOUTS[layout](torch.randn(*shape).to(device, dtype)).requires_grad_(grad)


def vector_shape(shape: Sequence[int], form: str) -> tuple[int, ...]:
    *frames, tokens, dim = shape
    return {
        "frame": (*frames, dim),
        "frame of one": (*frames, 1, dim),
        "token": (*frames, tokens, dim),
    }[form]


def vectors(count: int, shape: Sequence[int], form: str = "frame", **given: Any) -> list[Tensor]:
    """As one linear layer gives them: parts of one tensor, far apart in memory."""
    whole = vector_shape(shape, form)
    drawn = draw(*whole[:-1], count * whole[-1], **{"layout": "contiguous", "grad": False, **given})
    return [z.requires_grad_() for z in drawn.chunk(count, dim=-1)]


def weights(like: Tensor) -> Tensor:
    """An incoming gradient, the same for every backend."""
    count = like.numel()
    values = torch.arange(count, dtype=torch.float64, device=like.device)
    return values.mul(7).remainder(11).sub(5).div(4).reshape(like.shape).to(like.dtype)


def run(function: Callable[..., Tensor], *leaves: Tensor, grad: Any = None) -> tuple[Tensor, ...]:
    """The value, and the gradients of the leaves that want one, for a fixed incoming gradient."""
    value = function(*leaves)
    wanted = [z for z in leaves if z.requires_grad]
    incoming = weights(value) if grad is None else grad(value)
    gradients = torch.autograd.grad(value, wanted, incoming) if wanted else ()
    return value.detach(), *gradients


def wide(z: Tensor) -> Tensor:
    return z.detach().double().requires_grad_(z.requires_grad)


def same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def check(
    function: Callable[..., Tensor],
    backend: str,
    *leaves: Tensor,
    grad: Any = None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Hold a public function to the float64 reference, a second run to the first one's bits."""

    def call(name: str) -> Callable[..., Tensor]:
        return lambda *z: function(*z, backend=name, **settings)

    first, again = (run(call(backend), *leaves, grad=grad) for _ in range(2))
    same(again, first)
    plain = run(call("reference"), *leaves, grad=grad)
    truth = run(call("reference"), *map(wide, leaves), grad=grad)
    length = max(leaves[0].shape[-1] + leaves[0].shape[-2], FEWEST_ROUNDINGS)
    floor = 4 * torch.finfo(torch.float32).eps * length**0.5
    if function is modulated_layer_norm:
        floor *= _steepest(*leaves, settings.get("eps", 1e-6))
    for i, (mine, usual, true) in enumerate(zip(first, plain, truth, strict=True)):
        assert mine.dtype == usual.dtype
        assert_close_to_truth(
            mine, true, usual, mine.dtype, length, f"result {i}", floor if i else 0.0
        )
    return first


def _steepest(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> float:
    """The largest part of a gradient of x: the parts cancel in a token of one or two elements, as
    the terms of a vector's gradient may.
    """
    deviation = (wide(x).detach().var(dim=-1, correction=0) + eps).sqrt().min().item()
    return max(1.0, (1 + wide(scale).detach()).abs().max().item() / deviation)


def check_norm(backend: str, shape: Sequence[int], mix=MIXES[0], **given: Any):
    """given: form, layout, device; the rest are settings."""
    form, layout = given.pop("form", "frame"), given.pop("layout", "contiguous")
    where = {"device": given.pop("device", "cpu")}
    x = draw(*shape, dtype=mix[0], layout=layout, **where)
    shift, scale = vectors(2, shape, form, dtype=mix[2], **where)
    return check(modulated_layer_norm, backend, x, shift, scale, **given)


def check_gate(backend: str, shape: Sequence[int], mix=MIXES[0], **given: Any):
    form, layout = given.pop("form", "frame"), given.pop("layout", "contiguous")
    where = {"device": given.pop("device", "cpu")}
    x, y = (draw(*shape, dtype=dtype, layout=layout, **where) for dtype in mix[:2])
    (gate,) = vectors(1, shape, form, dtype=mix[2], **where)
    return check(gated_residual, backend, x, y, gate, **given)
