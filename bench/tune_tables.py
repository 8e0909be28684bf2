"""What `bench.tune` tries: for each op with a table of launch configurations its shapes and values,
and the shapes that the threshold between `cuda` and `triton` is read off.

The values are few, so that a run takes minutes: those of the general tables and their neighbours.
Bytes of shared memory are those of the operands that the software pipeline holds, a lower bound; a
candidate that takes more than it promises fails to launch and is left out by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from bench import barlow as bench_barlow
from bench import measure
from bench import vicreg as bench_vicreg
from bench.measure import Step
from vicreg_kernels.attention import masked_attention
from vicreg_kernels.attention.triton import configs as attention_configs
from vicreg_kernels.barlow.triton import configs as barlow_configs
from vicreg_kernels.vicreg.triton import configs as vicreg_configs

# The dtype that stands for a format.
DTYPES = {"half": torch.bfloat16, "single": torch.float32}


@dataclass(frozen=True)
class Problem:
    """A row of a table: its format and shape, the general configuration, and how a step is made."""

    format: str
    key: dict[str, Any]
    general: Any
    build: Callable[[], Step]
    device: str

    @property
    def itemsize(self) -> int:
        return DTYPES[self.format].itemsize

    def __str__(self) -> str:
        return " ".join([self.format, *(f"{name} {value}" for name, value in self.key.items())])


@dataclass(frozen=True)
class Table:
    """An op's table: the module whose functions `lookups` the launchers ask, the rows that are
    measured on a device, and by format the values of each field, in the order they are tuned.

    shared(problem, field, value): bytes of shared memory that a launch with it takes at least.
    used(problem, field): whether the row's kernels look at it.
    """

    module: ModuleType
    lookups: tuple[str, ...]
    problems: Callable[[str], list[Problem]]
    candidates: dict[str, dict[str, tuple[Any, ...]]]
    shared: Callable[[Problem, str, Any], int] = lambda problem, name, value: 0
    used: Callable[[Problem, str], bool] = lambda problem, name: True


@dataclass(frozen=True)
class Side:
    """A shape of a threshold. build() -> the step of each of the two backends, by name."""

    format: str
    shape: tuple[int, int]
    build: Callable[[], dict[str, Step]]

    def __str__(self) -> str:
        return f"{self.format} {self.shape[0]}x{self.shape[1]}"


def _loss_steps(bench: Any, shape: tuple[int, int], device: str, format: str) -> dict[str, Step]:
    """Forward and backward of vicreg or barlow on each backend of a GPU."""
    x, y = bench.views(bench.Shape(*shape), torch.device(device), DTYPES[format])
    loss = bench.vicreg_loss if bench is bench_vicreg else bench.barlow_twins_loss
    return {
        name: measure.gradients(partial(loss, backend=name), x, y) for name in ("cuda", "triton")
    }


def _loss_step(bench: Any, shape: tuple[int, int], device: str, format: str) -> Step:
    return _loss_steps(bench, shape, device, format)["triton"]


# ------------------------------------------------------------------------------------------ vicreg


def _vicreg_problems(device: str) -> list[Problem]:
    """The general table's rows, the half ones first: that is what GPUs train in."""
    return [
        Problem(
            format, {"shape": list(shape)}, config,
            partial(_loss_step, bench_vicreg, shape, device, format), device,
        )
        for wanted in DTYPES
        for table, format, shape, config in vicreg_configs.shipped()
        if table == "default" and format == wanted
    ]  # fmt: skip


def _products_shared(problem: Problem, name: str, value: Any) -> int:
    if name == "product":
        tile, depth, _, stages = value
        return stages * 2 * tile * depth * problem.itemsize
    if name == "gradient":  # the square matrix is float32 in memory
        rows, columns, depth, _, stages = value
        return stages * depth * (4 * rows + problem.itemsize * columns)
    if name in _TMA:
        rows, columns, depth, _, stages, _ = value
        return stages * depth * (rows + columns) * problem.itemsize
    return 0


_PRODUCTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "half": {
        "gradient": (
            (64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (64, 128, 32, 4, 3), (128, 64, 32, 8, 3),
            (128, 64, 64, 8, 2), (128, 128, 32, 8, 3), (128, 128, 32, 8, 4),
        ),
        "product": (
            (64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 8, 3), (128, 64, 8, 3),
            (128, 64, 8, 4),
        ),
    },
    "single": {
        "gradient": (
            (64, 64, 32, 4, 3), (64, 64, 16, 4, 3), (128, 64, 16, 8, 3), (128, 64, 32, 8, 3),
        ),
        "product": ((64, 16, 4, 3), (64, 32, 4, 3), (128, 16, 8, 3), (128, 32, 8, 2)),
    },
}  # fmt: skip
# Products with TMA operands, of half precision: rows, columns, depth, warps, stages, band.
_TMA: dict[str, tuple[Any, ...]] = {
    "tma_product": ((128, 128, 64, 4, 3, 8), (128, 128, 64, 8, 3, 8), (128, 128, 64, 8, 4, 8)),
    "tma_gradient": (
        (128, 128, 64, 4, 3, 16), (128, 128, 64, 8, 3, 16), (128, 128, 64, 8, 4, 16),
        (128, 256, 64, 8, 3, 8), (128, 256, 64, 8, 3, 16),
    ),
}  # fmt: skip


def _vicreg_used(problem: Problem, name: str) -> bool:
    """bfloat16 rows that have TMA tiles take these in the place of the others."""
    tma = problem.general.tma
    if name in _TMA:
        return tma
    return not tma or name not in ("product", "gradient", "occupancy")


_STATISTICS = {"statistics": ((16, 64, 4), (32, 32, 4), (32, 64, 4), (32, 64, 8))}
_VICREG = {
    format: {
        **(_TMA if format == "half" else {}),
        **products,
        **_STATISTICS,
        "strips": ((8, 64, 4), (8, 128, 4)),
        "occupancy": (1, 2),
    }
    for format, products in _PRODUCTS.items()
}

# ------------------------------------------------------------------------------------------ barlow

BARLOW_SHAPES = (
    (256, 8192), (256, 2048), (1024, 2048), (2048, 512), (2048, 8192), (4096, 8192), (8192, 2048),
    (8192, 4096), (64, 8192),
)  # fmt: skip


def _barlow_problems(device: str) -> list[Problem]:
    return [
        Problem(
            format, {"shape": list(shape)}, barlow_configs.general(format, *shape),
            partial(_loss_step, bench_barlow, shape, device, format), device,
        )
        for format in DTYPES
        for shape in BARLOW_SHAPES
    ]  # fmt: skip


_BARLOW = {
    format: {
        **products,
        **_STATISTICS,
        "finish": ((8, 128, 4), (16, 128, 4), (16, 64, 4)),
        "occupancy": (1, 2),
    }
    for format, products in _PRODUCTS.items()
}

# --------------------------------------------------------------------------------------- attention

# Tokens of all samples together, and heads: enough to fill a GPU at every length.
TOKENS, HEADS = 16384, 16


def _attention_step(head_dim: int, tokens: int, device: str, format: str) -> Step:
    shape = (max(1, TOKENS // tokens), HEADS, tokens, head_dim)
    *leaves, grad = (torch.randn(shape, device=device, dtype=DTYPES[format]) for _ in range(4))
    leaves = [x.requires_grad_() for x in leaves]

    def step() -> Any:
        return torch.autograd.grad(masked_attention(*leaves, backend="triton"), leaves, grad)

    return step


def _attention_problems(device: str) -> list[Problem]:
    """The rows of the general table for this GPU, the half ones first."""
    major = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
    general = attention_configs.GENERAL.get(major, "sm_80")
    return [
        Problem(
            format, {"head_dim": head_dim, "tokens": tokens}, config,
            partial(_attention_step, head_dim, tokens, device, format), device,
        )
        for wanted in DTYPES
        for table, format, (head_dim, tokens), config in attention_configs.shipped()
        if table == general and format == wanted
    ]  # fmt: skip


def _attention_shared(problem: Problem, name: str, value: Any) -> int:
    """One tile is kept; of the other rows the pipeline holds two operands."""
    queries, keys, _, stages = value
    kept, moving = (keys, queries) if name == "key_gradient" else (queries, keys)
    return problem.itemsize * problem.key["head_dim"] * (kept + stages * 2 * moving)


_ATTENTION: dict[str, dict[str, tuple[Any, ...]]] = {
    "half": {
        "key_gradient": (
            (64, 64, 4, 2), (32, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2),
        ),
        "query_gradient": (
            (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2),
        ),
        "forward": (
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3),
            (128, 128, 8, 2),
        ),
    },
    "single": {
        "key_gradient": ((16, 64, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1), (32, 32, 8, 1)),
        "query_gradient": ((64, 16, 8, 1), (32, 16, 4, 1), (16, 16, 8, 1), (32, 32, 8, 1)),
        "forward": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 4, 2), (16, 32, 4, 1)),
    },
}  # fmt: skip

TABLES = {
    "vicreg": Table(
        vicreg_configs,
        ("nearest",),
        _vicreg_problems,
        _VICREG,
        _products_shared,
        _vicreg_used,
    ),
    "attention": Table(
        attention_configs, ("nearest",), _attention_problems, _ATTENTION, _attention_shared
    ),
    "barlow": Table(barlow_configs, ("choose",), _barlow_problems, _BARLOW, _products_shared),
}

# ------------------------------------------------------------------------------------- thresholds

# min(N, D) of 512 to 8192, on both sides of N = D.
SIDES = (
    (512, 8192), (2048, 512), (1024, 8192), (8192, 1024), (2048, 8192), (8192, 2048), (4096, 8192),
    (8192, 4096), (8192, 16384), (8192, 8192),
)  # fmt: skip


def _sides(bench: Any, device: str) -> list[Side]:
    return [
        Side(format, shape, partial(_loss_steps, bench, shape, device, format))
        for format in DTYPES
        for shape in SIDES
    ]


THRESHOLDS = {"vicreg": partial(_sides, bench_vicreg), "barlow": partial(_sides, bench_barlow)}
