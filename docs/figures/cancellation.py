"""Draws docs/assets/cancellation.png: error of the covariance term and of its gradient when some
dimensions dominate, for three ways to compute them in float32.

    python docs/figures/cancellation.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import vicreg_kernels as vk

ROWS, DIM, SEEDS = 64, 512, 5
SCALES = np.logspace(0, 3, 13)


def plain_gram(z: Tensor) -> tuple[Tensor, Tensor]:
    """The straightforward float32 Gram form: one subtraction of two large sums."""
    rows, dim = z.shape
    centred = z - z.mean(dim=0)
    scatter = centred.square().sum(dim=0)
    gram = centred @ centred.T
    factor = 1.0 / ((rows - 1) ** 2 * dim)
    value = (gram.square().sum() - scatter.square().sum()) * factor
    return value, 4 * factor * (gram @ centred - centred * scatter)


def differentiated(z: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    _, value = vk.variance_covariance(z, backend=backend)
    value.backward()
    assert z.grad is not None
    return value.detach(), z.grad


def errors(scale: float, dominating: int, seed: int) -> dict[str, tuple[float, float]]:
    """Relative error of the value, and of the gradient in the dominating columns."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(ROWS, DIM, generator=generator)
    z[:, :dominating] *= scale
    value, gradient = differentiated(z.double(), "reference")
    columns = slice(0, dominating)
    found = {
        "D x D, float32": differentiated(z, "reference"),
        "plain Gram, float32": plain_gram(z),
        "this library, cpu": differentiated(z, "cpu"),
    }
    return {
        name: (
            float((v.double() - value).abs() / value),
            float((g.double() - gradient)[:, columns].norm() / gradient[:, columns].norm()),
        )
        for name, (v, g) in found.items()
    }


def main() -> None:
    styles = {
        "D x D, float32": ("0.45", "s"),
        "plain Gram, float32": ("tab:red", "o"),
        "this library, cpu": ("tab:blue", "D"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, constrained_layout=True)
    measured = [[errors(float(s), 1, seed) for seed in range(SEEDS)] for s in SCALES]
    titles = ("covariance term", "gradient, dominating column")
    for part, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for name, (colour, marker) in styles.items():
            medians = [
                max(float(np.median([e[name][part] for e in row])), 1e-9) for row in measured
            ]
            axis.loglog(SCALES, medians, marker=marker, ms=4, color=colour, label=name)
        axis.axhline(1e-4, color="0.7", lw=1, ls="--")
        axis.set_title(title)
        axis.set_xlabel("scale of one dimension over the others")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative error against float64")
    axes[0].text(1.1, 1.25e-4, "required: 1e-4", color="0.45", fontsize=8)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"One dimension dominates, N = {ROWS}, D = {DIM} (median of {SEEDS} draws)")
    target = Path(__file__).parent.parent / "assets" / "cancellation.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
