"""The VICReg op: the shapes that are measured, its contenders, and the ratios to reach."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.case import Case, Plan, Step
from bench.vicreg_baselines import BASELINES, COMPILED, PEERS
from vicreg_kernels import variance_covariance, vicreg_loss
from vicreg_kernels.core import dispatch

TITLE = "VICReg loss, forward and backward, by batch x dimensions"
CONTENDERS = {
    "eager": "published formula, eager",
    "compiled": "published formula, torch.compile",
    "gram_plain": "Gram trick, plain PyTorch",
    "gram_compiled": "Gram trick, torch.compile",
    "gram_best": "Gram trick, best plain PyTorch",
    "lightly": "lightly",
    "metric_learning": "pytorch-metric-learning",
}


@dataclass(frozen=True)
class Shape:
    """Two views of `groups` sets of embeddings [rows, dim]; groups = 0: not grouped."""

    rows: int
    dim: int
    groups: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups,) * bool(self.groups) + (self.rows, self.dim)

    def elements(self) -> int:
        """Of one view."""
        return max(self.groups, 1) * self.rows * self.dim

    def least_bytes(self, itemsize: int) -> int:
        """Both views read once, both gradients written once."""
        return 4 * self.elements() * itemsize

    def least_operations(self) -> int:
        """A view: m (m + 1) L for the symmetric product, 2 m^2 L for the gradient, m the smaller
        of N and D and L the other."""
        side = min(self.rows, self.dim)
        return 2 * self.elements() * (side + 1 + 2 * side)


def ours(x: Tensor, y: Tensor, backend: str | None = None, precision: str | None = None) -> Tensor:
    """The loss of `vicreg_baselines.eager`, through the public functions."""
    if x.dim() == 2:
        return vicreg_loss(x, y, precision=precision, backend=backend)
    losses = []
    for view in (x, y):
        variance, covariance = variance_covariance(view, precision=precision, backend=backend)
        losses.append(25 * variance + covariance)
    return losses[0] + losses[1]


def views(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two correlated views with standard deviations about the margin."""
    where = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(shape.shape, **where) * 0.9
    y = x + 0.4 * torch.randn(shape.shape, **where)
    return tuple(z.to(dtype).requires_grad_() for z in (x, y))


def in_tf32(step: Step) -> Step:
    """The step while torch allows TF32 in float32 products."""

    def run() -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return step()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def tf32_plan(
    shape: Shape, parts: int, device: torch.device, dtype: torch.dtype, backend: str | None
) -> Plan:
    """Ours on `cuda`, its float32 products as three TF32 ones or as cuBLAS's single one, beside
    plain PyTorch in full float32. `ours_cuda` of the shape's own case is cuBLAS in full float32.
    """
    x, y = views(shape, device, dtype)
    precision = "tf32x3" if parts == 3 else None
    step = measure.gradients(partial(ours, backend="cuda", precision=precision), x, y)
    return Plan(
        {
            "ours": step if parts == 3 else in_tf32(step),
            "gram_best": measure.gradients(BASELINES["gram_best"](), x, y),
        },
        "cuda",
        shape.least_bytes(dtype.itemsize),
        shape.least_operations(),
    )


def tf32_case(rows: int, dim: int, parts: int) -> Case:
    shape = Shape(rows, dim)
    return Case(
        f"{rows}x{dim}_{'tf32x3' if parts == 3 else 'tf32'}",
        partial(tf32_plan, shape, parts),
        targets={},
        dtypes={"cuda": ("float32",)},
        each_backend=False,
    )


def left_out(name: str, shape: Shape, device: torch.device) -> str | None:
    """Why this baseline does not take part; None: it does."""
    if name in PEERS and shape.groups:
        return "has no loss over groups without the invariance"
    if device.type == "cpu" and name == "gram_compiled":
        return "on the CPU gram_best is the faster one"
    if device.type == "cpu" and name in PEERS and shape.dim == 8192 and shape.rows != 256:
        return "its D x D products at D = 8192 take over 10 s whatever N is: see 256x8192"
    return None


def plan(shape: Shape, device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    x, y = views(shape, device, dtype)
    steps = {"ours": measure.gradients(partial(ours, backend=backend), x, y)}
    skipped = {}
    for name, build in BASELINES.items():
        try:
            reason = left_out(name, shape, device)
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
        dispatch.choose("vicreg", backend, x.device, dtype, side),
        shape.least_bytes(dtype.itemsize),
        shape.least_operations(),
        compiled=COMPILED,
        skipped=skipped,
        peers=PEERS,
    )


def case(
    rows: int,
    dim: int,
    groups: int = 0,
    cpu: dict[str, float] | None = None,
    cuda: dict[str, float] | None = None,
    quick: bool = False,
    on: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    """cpu, cuda: the least ratios, on two cores and on an H100; `on`: where it is measured."""
    shape = Shape(rows, dim, groups)
    dtypes = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
    return Case(
        "x".join(map(str, shape.shape)),
        partial(plan, shape),
        targets={"cpu": cpu or {}, "cuda": {"gram_best": 1.3, **(cuda or {})}},
        dtypes={device: dtypes[device] for device in on},
        quick=quick,
        floor=2.5,
    )


TF32 = ((256, 8192), (1024, 2048), (2048, 8192), (8192, 2048))
THRESHOLD = ((4096, 8192), (8192, 4096), (8192, 8192), (8192, 16384), (8192, 2048), (1024, 8192),
             (8192, 1024))  # fmt: skip
CASES = {
    c.name: c
    for c in (
        case(256, 8192, cpu={"eager": 110, "gram_plain": 1.25}, cuda={"eager": 60, "compiled": 15}),
        case(2048, 8192, cuda={"eager": 4}, on=("cuda",)),
        case(256, 2048, cpu={"eager": 20, "gram_plain": 1.25}, quick=True),
        case(1024, 2048, cpu={"eager": 4.5, "gram_plain": 1.25}, quick=True),
        case(2048, 512, cpu={"eager": 2.3, "gram_plain": 1.25}, quick=True),
        case(64, 8192, cpu={"eager": 500, "gram_plain": 1.25}, quick=True),
        case(6528, 512, cpu={"eager": 1.9, "gram_plain": 1.25}, quick=True),
        case(512, 8192),
        case(16384, 384),
        case(512, 512, groups=49),
        *(tf32_case(*shape, parts) for shape in TF32 for parts in (3, 1)),
        # What the backends' threshold is read off: min(N, D) from 512 to 8192 on both sides of
        # N = D, with the cases above.
        *(case(*shape, on=("cuda",)) for shape in THRESHOLD),
    )
}

# Both sides of N = D, no side a multiple of a tile's.
SMALL = ((13, 67), (67, 13), (130, 33), (33, 130))


def exercise(backend: str, device: str) -> int:
    """Forward and backward of one and two views, grouped and strided; counts what is not finite."""
    bad = 0
    for dtype in (torch.float32, torch.bfloat16):
        results: list[Tensor] = []
        for rows, dim in SMALL:
            x, y = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(2))
            x.requires_grad_()
            y.requires_grad_()
            loss = vicreg_loss(x, y, backend=backend)
            results += (loss, *torch.autograd.grad(loss, (x, y)))
            loss = vicreg_loss(x, y, precision="tf32x3", backend=backend)
            results += (loss, *torch.autograd.grad(loss, (x, y)))
        z = torch.randn(3, 26, 67, device=device).to(dtype)[:, ::2].requires_grad_()
        total = sum(variance_covariance(z, backend=backend))
        results += (total, *torch.autograd.grad(total, (z,)))
        bad += sum(not result.isfinite().all().item() for result in results)
    return bad
