"""VICRegL: the shapes that are measured, its contenders, and the ratios to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import measure
from bench.case import Case, Plan
from bench.vicregl_baselines import COMPILED, baselines
from vicreg_kernels.core import dispatch
from vicreg_kernels.vicregl import vicregl_loss

TITLE = "VICRegL, forward and backward, by batch x views x positions x channels"
CONTENDERS = {
    "eager": "published formula, eager",
    "compiled": "published formula, torch.compile",
    "gram_plain": "shared searches and Gram trick, plain PyTorch",
    "gram_compiled": "the same, torch.compile",
}


@dataclass(frozen=True)
class Shape:
    """sides: of the square map of each view, the two large ones first; the rest as published."""

    batch: int
    sides: tuple[int, ...]
    channels: int
    dim: int
    fast: bool = False

    @property
    def name(self) -> str:
        at = self.positions()
        views = f"2x{at[0]}" + (f"+{len(at) - 2}x{at[-1]}" if len(at) > 2 else "")
        return f"{self.batch}x{views}x{self.channels}-{self.dim}" + ("-fast" if self.fast else "")

    def positions(self) -> list[int]:
        return [side * side for side in self.sides]

    def pairs(self) -> list[tuple[int, int]]:
        """Positions of each unordered pair of a large view and another."""
        at = self.positions()
        return [(at[0], at[1])] + [(at[i], j) for i in range(2) for j in at[2:]]

    def places(self) -> int:
        """Sets of B vectors of C channels whose statistics the loss has, each counted once."""
        at = self.positions()
        if self.fast:
            return sum(at)
        matched = sum(a + b for a, b in self.pairs())  # nearest ones by feature, both ways
        kept = 2 * sum((20, 4)) * len(self.pairs()) + 2 * sum((20, 4))  # by location, both sides
        return sum(at) + matched + kept

    def least_bytes(self, itemsize: int) -> int:
        """Maps, embeddings and their gradients once; the grids once."""
        elements = sum(self.positions()) * self.channels + len(self.sides) * self.dim
        return self.batch * (2 * itemsize * elements + 8 * sum(self.positions()))

    def least_operations(self) -> int:
        """Distances, three a channel; a symmetric product and a gradient on the smaller side for
        every place and every embedding.
        """
        search = 3 * self.channels * self.batch * sum(a * b for a, b in self.pairs())
        side, length = sorted((self.batch, self.channels))
        statistics = self.places() * (side * (side + 1) * length + 2 * side * side * length)
        side, length = sorted((self.batch, self.dim))
        joint = len(self.sides) * (side * (side + 1) * length + 2 * side * side * length)
        return search + statistics + joint


def ours(shape: Shape, backend: str | None) -> Callable[..., Tensor]:
    return lambda e, m, g: vicregl_loss(e, m, g, fast_vc_reg=shape.fast, backend=backend)


def draw(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """Views that resemble each other; grids of crops that overlap, in pixels."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    common = randn(shape.batch, shape.dim)
    content = randn(shape.batch, 1, shape.channels)
    embeddings, maps, grids = [], [], []
    for side in shape.sides:
        embeddings.append(0.8 * common + 0.4 * randn(shape.batch, shape.dim))
        maps.append(0.5 * content + 0.7 * randn(shape.batch, side * side, shape.channels))
        corner = 100 * torch.rand(shape.batch, 1, 1, 2, generator=generator)
        step = 20 + 20 * torch.rand(shape.batch, 1, 1, 1, generator=generator)
        cell = torch.stack(torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"), dim=-1)
        grids.append((corner + step * cell).flatten(1, 2).to(device))
    leaves = [
        [z.to(device=device, dtype=dtype).requires_grad_() for z in zs] for zs in (embeddings, maps)
    ]
    return leaves[0], leaves[1], grids


def plan(shape: Shape, device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    embeddings, maps, grids = draw(shape, device, dtype)
    leaves, views = [*embeddings, *maps], len(maps)

    def step(loss: Callable[..., Tensor]) -> measure.Step:
        return measure.gradients(lambda *z: loss(z[:views], z[views:], grids), *leaves)

    steps = {"ours": step(ours(shape, backend))}
    skipped = {}
    for name, build in baselines(shape.fast).items():
        if device.type == "cpu" and name in COMPILED:
            skipped[name] = "its graph of every pair of views takes minutes to compile for a CPU"
        elif dtype != torch.float32:
            skipped[name] = "torch.cdist takes no half inputs"
        else:
            steps[name] = step(build())
    return Plan(
        steps,
        dispatch.choose("vicregl", backend, device.type, dtype),
        shape.least_bytes(dtype.itemsize),
        shape.least_operations(),
        compiled=COMPILED,
        skipped=skipped,
    )


def case(shape: Shape, cpu: dict[str, float] | None = None, quick: bool = False) -> Case:
    devices: dict[str, tuple[str, ...]] = {"cpu": ("float32",), "cuda": ("float32",)}
    if cpu is None:
        del devices["cpu"]
    targets = {"cpu": cpu or {}, "cuda": {"eager": 5.0, "gram_plain": 1.3}}
    return Case(shape.name, partial(plan, shape), targets=targets, dtypes=devices, quick=quick)


CASES = {
    c.name: c
    for c in (
        # facebookresearch/VICRegL on 8 GPUs with ResNet-50: 64 a GPU, 2048 or the default 8192
        case(Shape(64, (7, 7), 512, 2048), cpu={"eager": 5.0, "gram_plain": 1.3}, quick=True),
        case(Shape(64, (7, 7), 512, 8192), cpu={"eager": 5.0, "gram_plain": 1.3}),
        case(Shape(64, (7, 7), 512, 2048, fast=True), cpu={"eager": 5.0, "gram_plain": 1.3}),
        # ConvNeXt-S: 48 a GPU, two large crops and six small ones
        case(Shape(48, (7, 7, 3, 3, 3, 3, 3, 3), 512, 8192)),
    )
}

# Two views and small ones, rows on both sides of C, no side a multiple of a tile's.
SMALL = (Shape(5, (5, 5), 33, 17), Shape(9, (6, 6, 2, 3), 6, 5), Shape(3, (5, 5, 2), 70, 130, True))


def exercise(backend: str, device: str) -> int:
    """Forward and backward in each dtype and way; counts what is not finite."""
    bad = 0
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SMALL:
            embeddings, maps, grids = draw(shape, torch.device(device), dtype)
            loss = ours(shape, backend)(embeddings, maps, grids)
            results = (loss, *torch.autograd.grad(loss, [*embeddings, *maps]))
            bad += sum(not result.isfinite().all().item() for result in results)
    return bad
