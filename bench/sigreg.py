"""The SIGReg op: the shapes that are measured, its contenders, and the ratios to reach."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import measure
from bench.case import Case, Plan
from bench.sigreg_baselines import BASELINES, COMPILED, PEERS
from vicreg_kernels.core import dispatch
from vicreg_kernels.sigreg import sigreg_loss

TITLE = "SIGReg loss, forward and backward, by batch x dimensions x slices x knots"
CONTENDERS = {
    "eager": "published formula, eager",
    "compiled": "published formula, torch.compile",
    "rotations": "one cosine, rotations, plain PyTorch",
    "rotations_compiled": "one cosine, rotations, torch.compile",
    "lightly": "lightly",
}


@dataclass(frozen=True)
class Shape:
    """`groups` sets of embeddings [rows, dim] (0: not grouped), directions, knots."""

    rows: int
    dim: int
    slices: int = 1024
    knots: int = 17
    groups: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups,) * bool(self.groups) + (self.rows, self.dim)

    @property
    def name(self) -> str:
        return "x".join(map(str, (*self.shape, self.slices, self.knots)))

    def projections(self) -> int:
        return max(self.groups, 1) * self.rows * self.slices

    def least_bytes(self, itemsize: int) -> int:
        """z read once and its gradient written once, the directions read forward and backward."""
        elements = max(self.groups, 1) * self.rows * self.dim
        return 2 * (elements + self.dim * self.slices) * itemsize

    def least_operations(self) -> int:
        """The two products; for each projection and knot but t = 0 a cosine and a sine added
        forward, two multiply-adds backward.
        """
        return self.projections() * (4 * self.dim + 6 * (self.knots - 1))


def ours(z: Tensor, slices: int, knots: int, backend: str | None = None) -> Tensor:
    return sigreg_loss(z, slices=slices, knots=knots, step=1, backend=backend)


def plan(shape: Shape, device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    generator = torch.Generator().manual_seed(0)
    z = 0.9 * torch.randn(shape.shape, generator=generator)
    z = z.to(device=device, dtype=dtype).requires_grad_()
    mine = partial(ours, slices=shape.slices, knots=shape.knots, backend=backend)
    steps = {"ours": measure.gradients(mine, z)}
    skipped = {}
    for name, build in BASELINES.items():
        try:
            if device.type == "cpu" and shape.projections() * shape.knots > 1 << 27:
                raise ImportError("its N x M x K angles take over 10 GB")
            loss = build(shape.slices, shape.knots, device)
        except ImportError as error:
            skipped[name] = str(error)
        else:
            steps[name] = measure.gradients(loss, z)
    return Plan(
        steps,
        dispatch.choose("sigreg", backend, device.type, dtype),
        shape.least_bytes(dtype.itemsize),
        shape.least_operations(),
        compiled=COMPILED,
        skipped=skipped,
        peers=PEERS,
    )


def case(
    shape: Shape,
    cpu: dict[str, float] | None = None,
    cuda: dict[str, float] | None = None,
    quick: bool = False,
    on: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    """cpu, cuda: the least ratios, on two cores and on an H100; `on`: where it is measured."""
    dtypes = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
    return Case(
        shape.name,
        partial(plan, shape),
        targets={"cpu": cpu or {}, "cuda": cuda or {}},
        dtypes={device: dtypes[device] for device in on},
        quick=quick,
    )


CASES = {
    c.name: c
    for c in (
        case(Shape(1024, 128), cpu={"eager": 30, "compiled": 8}, quick=True),
        case(Shape(512, 192), quick=True),
        case(Shape(2048, 512), quick=True),
        case(Shape(2048, 512, slices=4096, knots=41), on=("cuda",)),
        case(Shape(128, 192, groups=16), on=("cuda",)),
    )
}


def exercise(backend: str, device: str) -> int:
    """Every kernel: equally spaced knots from the spacing and from half of it, fewer and more than
    are formed one by one, and unequal ones; grouped and strided.
    """
    rules: tuple[dict[str, object], ...] = (
        {},
        {"convention": "eb_jepa"},
        {"convention": "eb_jepa", "knots": 38},
        {"knots": 41},
        {"knots": [0.0, 0.3, 0.5, 2.0]},
    )
    bad = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((13, 67), (130, 33), (3, 26, 21)):
            z = torch.randn(shape, device=device).to(dtype)[..., ::2, :].requires_grad_()
            for rule in rules:
                loss = sigreg_loss(z, slices=75, backend=backend, **rule)  # type: ignore[arg-type]
                results = (loss, *torch.autograd.grad(loss, (z,)))
                bad += sum(not result.isfinite().all().item() for result in results)
    return bad
