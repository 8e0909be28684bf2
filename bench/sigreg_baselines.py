"""What SIGReg is measured against: the published formula, one cosine a projection in plain PyTorch,
and a package.

A baseline is built for M directions and K knots on [0, 3], and maps z, [N, D] or grouped [G, N, D],
to the loss. Each draws its own directions in every call, as in training.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import compiled

Loss = Callable[[Tensor], Tensor]
T_MAX = 3.0


def draw(z: Tensor, slices: int) -> Tensor:
    a = torch.randn(z.shape[-1], slices, device=z.device, dtype=z.dtype)
    return a / a.norm(dim=0)


def rule(knots: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Knots on [0, T_MAX], exp(-t^2 / 2) there, and the trapezoid rule's weights times that."""
    t = torch.linspace(0, T_MAX, knots, device=device)
    weights = torch.full((knots,), 2 * T_MAX / (knots - 1), device=device)
    weights[0] = weights[-1] = T_MAX / (knots - 1)
    phi = torch.exp(-0.5 * t * t)
    return t, phi, weights * phi


def eager_loss(slices: int, knots: int, device: torch.device) -> Loss:
    """lejepa's form: all N x M x K angles, their cosines and sines averaged over rows."""
    t, phi, weights = rule(knots, device)

    def eager(z: Tensor) -> Tensor:
        angles = (z @ draw(z, slices)).unsqueeze(-1) * t
        errors = (angles.cos().mean(dim=-3) - phi).square() + angles.sin().mean(dim=-3).square()
        return ((errors @ weights) * z.shape[-2]).mean()

    return eager


class _Rotations(torch.autograd.Function):
    """One cosine and sine a projection and a rotation a knot; the gradient by Horner's rule."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, a: Tensor, knots: int, weights: Tensor) -> Tensor:
        p = z @ a
        step = T_MAX / (knots - 1)
        angle = p.float() * step
        c, s = angle.cos(), angle.sin()
        x, y = c, s
        rows = z.shape[-2]
        total = p.new_zeros((), dtype=torch.float32)
        factors = []
        for k in range(1, knots):
            t = k * step
            real = x.mean(dim=-2, keepdim=True) - math.exp(-0.5 * t * t)
            imaginary = y.mean(dim=-2, keepdim=True)
            total = total + weights[k] * (real.square() + imaginary.square()).sum()
            slope = 2 * t * weights[k] / (p.numel() // rows)
            factors.append((slope * imaginary, slope * real))
            if k + 1 < knots:
                x, y = torch.addcmul(x * c, y, s, value=-1), torch.addcmul(x * s, y, c)
        ctx.save_for_backward(c, s, a, *(f for pair in factors for f in pair))
        return total * rows / (p.numel() // rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        c, s, a, *flat = ctx.saved_tensors
        x, y = torch.zeros_like(c), torch.zeros_like(s)  # of sum_k (a_k - i b_k) e^{ik angle}
        for k in range(len(flat) - 2, -1, -2):
            x, y = (
                torch.addcmul(x * c, y, s, value=-1).add_(flat[k]),
                torch.addcmul(x * s, y, c).add_(flat[k + 1]),
            )
        x = torch.addcmul(x * c, y, s, value=-1)
        return (grads[0] * x).to(a.dtype) @ a.mT, None, None, None


def rotations_loss(slices: int, knots: int, device: torch.device) -> Loss:
    _, _, weights = rule(knots, device)
    return lambda z: _Rotations.apply(z, draw(z, slices), knots, weights)


def lightly_loss(slices: int, knots: int, device: torch.device) -> Loss:
    """lightly's SIGReg, loaded by path: importing lightly.loss would need torchvision."""
    package = importlib.util.find_spec("lightly")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("lightly is not installed")
    path = Path(package.submodule_search_locations[0]) / "loss" / "lejepa_loss.py"
    if not path.exists():
        raise ModuleNotFoundError("this lightly has no SIGReg")
    spec = importlib.util.spec_from_file_location("_lightly_lejepa_loss", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} cannot be loaded")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SIGReg(knots=knots, t_max=T_MAX, num_vectors=slices).to(device)


# Each builds its baseline; a peer that is not installed raises ImportError.
BASELINES: dict[str, Callable[[int, int, torch.device], Loss]] = {
    "eager": eager_loss,
    "compiled": lambda *shape: compiled(eager_loss(*shape)),
    "rotations": rotations_loss,
    "rotations_compiled": lambda *shape: compiled(rotations_loss(*shape)),
    "lightly": lightly_loss,
}
COMPILED = ("compiled", "rotations_compiled")
PEERS = ("lightly",)
