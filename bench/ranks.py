"""The losses across ranks: two gloo processes of one thread each, which hold half of the batch.

A step tells both to run, and is over when both are. What is timed is what a training step waits
for: forward, backward and everything the two exchange. Memory is the workers' and is not seen.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import measure
from bench.case import Case, Plan
from bench.vicreg_baselines import eager
from bench.vicreg_gram import gram_best
from vicreg_kernels import vicreg_loss

TITLE = "VICReg loss across ranks, forward and backward, by ranks x rows of each x dimensions"
CONTENDERS = {
    "gathered": "published: gather both views, formula on all ranks",
    "gathered_gram": "gather both views, Gram trick, best plain PyTorch",
}


class _Gather(torch.autograd.Function):
    """The published differentiable all-gather; its backward sums over ranks and takes own rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _gathered(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: loss(_Gather.apply(x), _Gather.apply(y))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": partial(vicreg_loss, process_group=True),
    "gathered": _gathered(eager),
    "gathered_gram": _gathered(gram_best),
}


@dataclass(frozen=True)
class Shape:
    """Two views of [rows, dim] on each of `ranks` ranks."""

    ranks: int
    rows: int
    dim: int

    def least_bytes(self) -> int:
        """float32: both views read once, both gradients written once, on all ranks."""
        return 4 * 4 * self.ranks * self.rows * self.dim

    def least_operations(self) -> int:
        """Over all ranks: the rows of a view by all (N < D) or their share of D x D, and the
        gradient's product.
        """
        total = self.ranks * self.rows
        return 2 * 2 * 2 * total * self.dim * min(total, self.dim)


def _serve(rank: int, shape: Shape, folder: str, dtype: torch.dtype, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", shape.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=shape.ranks)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(shape.rows, shape.dim, generator=generator) * 0.9
    y = x + 0.4 * torch.randn(shape.rows, shape.dim, generator=generator)
    x, y = (z.to(dtype).requires_grad_() for z in (x, y))
    steps = {name: measure.gradients(loss, x, y) for name, loss in LOSSES.items()}
    pipe.send(None)
    while (name := pipe.recv()) is not None:
        try:
            steps[name]()
            pipe.send(None)
        except Exception as error:
            pipe.send(error)
    dist.destroy_process_group()


class Ranks:
    """The processes; they end with this object."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(shape.ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, shape, self.folder.name, dtype, there), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        self.finalizer = weakref.finalize(self, _end, self.pipes, self.processes)
        self.answers()

    def answers(self) -> None:
        for error in [pipe.recv() for pipe in self.pipes]:
            if error is not None:
                raise error

    def step(self, name: str) -> None:
        for pipe in self.pipes:
            pipe.send(name)
        self.answers()


def _end(pipes: list[Connection], processes: list[Any]) -> None:
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(10)
        process.kill()


def plan(shape: Shape, device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
    if device.type != "cpu":
        raise ValueError(f"ranks: measured on the CPU, not on {device.type}")
    if backend is not None:
        raise ValueError("ranks: a process_group has one backend; leave --backend out")
    ranks = Ranks(shape, dtype)
    steps: dict[str, measure.Step] = {name: partial(ranks.step, name) for name in LOSSES}
    return Plan(steps, "ranks", shape.least_bytes(), shape.least_operations())


def case(ranks: int, rows: int, dim: int, targets: dict[str, float], quick: bool = False) -> Case:
    return Case(
        f"{ranks}x{rows}x{dim}",
        partial(plan, Shape(ranks, rows, dim)),
        targets={"cpu": targets},
        dtypes={"cpu": ("float32",)},
        quick=quick,
    )


CASES = {
    c.name: c
    for c in (
        case(2, 128, 8192, {"gathered": 50}),
        case(2, 128, 2048, {}, quick=True),
        case(2, 1024, 512, {}, quick=True),
    )
}
