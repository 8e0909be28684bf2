"""The Barlow Twins op: the shapes that are measured, its contenders, and the ratios to reach."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import measure
from bench.barlow_baselines import BASELINES, COMPILED, PEERS
from bench.case import Case, Plan
from vicreg_kernels.barlow import barlow_twins_loss
from vicreg_kernels.core import dispatch

TITLE = "Barlow Twins loss, forward and backward, by batch x dimensions"
CONTENDERS = {
    "eager": "published formula, eager",
    "compiled": "published formula, torch.compile",
    "gram_plain": "Gram trick, plain PyTorch",
    "gram_compiled": "Gram trick, torch.compile",
    "gram_best": "Gram trick, best plain PyTorch",
    "lightly": "lightly",
}


@dataclass(frozen=True)
class Shape:
    """Two views [rows, dim]."""

    rows: int
    dim: int

    def least_bytes(self, itemsize: int) -> int:
        """Both views read once, both gradients written once."""
        return 4 * self.rows * self.dim * itemsize

    def least_operations(self) -> int:
        """With m the smaller of N and D and L the other: m < D, two symmetric products
        m (m + 1) L forward, else one of 2 m^2 L; two of 2 m^2 L backward."""
        side, length = min(self.rows, self.dim), max(self.rows, self.dim)
        forward = 2 * side * (side + 1) if self.rows < self.dim else 2 * side**2
        return length * (forward + 4 * side**2)


def views(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two correlated views."""
    where = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn((shape.rows, shape.dim), **where)
    y = x + 0.4 * torch.randn((shape.rows, shape.dim), **where)
    return tuple(z.to(dtype).requires_grad_() for z in (x, y))


def left_out(name: str, device: torch.device) -> str | None:
    """Why this baseline does not take part; None: it does."""
    if device.type == "cpu" and name == "gram_compiled":
        return "on the CPU gram_best is the faster one"
    return None


def plan(shape: Shape, device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    x, y = views(shape, device, dtype)
    steps = {"ours": measure.gradients(partial(barlow_twins_loss, backend=backend), x, y)}
    skipped = {}
    for name, build in BASELINES.items():
        try:
            reason = left_out(name, device)
            loss = build() if reason is None else None
        except ImportError as error:
            loss, reason = None, str(error)
        if loss is None:
            skipped[name] = reason or "absent"
        else:
            steps[name] = measure.gradients(loss, x, y)
    side = min(shape.rows, shape.dim)
    return Plan(
        steps,
        dispatch.choose("barlow", backend, x.device, dtype, side),
        shape.least_bytes(dtype.itemsize),
        shape.least_operations(),
        compiled=COMPILED,
        skipped=skipped,
        peers=PEERS,
    )


def case(
    rows: int,
    dim: int,
    cpu: dict[str, float] | None = None,
    cuda: dict[str, float] | None = None,
    quick: bool = False,
    on: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    """cpu, cuda: the least ratios, on two cores and on an H100; `on`: where it is measured."""
    shape = Shape(rows, dim)
    dtypes = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
    return Case(
        f"{rows}x{dim}",
        partial(plan, shape),
        targets={"cpu": cpu or {}, "cuda": cuda or {}},
        dtypes={device: dtypes[device] for device in on},
        quick=quick,
    )


THRESHOLD = ((4096, 8192), (8192, 4096), (8192, 8192), (8192, 16384), (8192, 2048), (1024, 8192),
             (8192, 1024), (512, 8192))  # fmt: skip
CASES = {
    c.name: c
    for c in (
        case(256, 8192, cpu={"eager": 40, "gram_best": 1.2}),
        case(2048, 8192, on=("cuda",)),
        case(256, 2048, cpu={"eager": 6, "gram_plain": 1.2}, quick=True),
        case(1024, 2048, cpu={"eager": 1.5}, quick=True),
        case(2048, 512, quick=True),
        case(64, 8192, cpu={"eager": 100, "gram_plain": 1.2}),
        # What the backends' threshold is read off: min(N, D) from 512 to 8192 on both sides of
        # N = D, with the cases above.
        *(case(*shape, on=("cuda",)) for shape in THRESHOLD),
    )
}

# Both sides of N = D, no side a multiple of a tile's.
SMALL = ((13, 67), (67, 13), (130, 33), (33, 130), (300, 33))


def exercise(backend: str, device: str) -> int:
    """Forward and backward, whole and strided; counts what is not finite."""
    bad = 0
    for dtype in (torch.float32, torch.bfloat16):
        for rows, dim in SMALL:
            x, y = (torch.randn(2 * rows, dim, device=device).to(dtype) for _ in range(2))
            x, y = x[::2].requires_grad_(), y[:rows].requires_grad_()
            loss = barlow_twins_loss(x, y, backend=backend)
            results = (loss, *torch.autograd.grad(loss, (x, y)))
            bad += sum(not result.isfinite().all().item() for result in results)
    return bad
