"""Sums and gathers over ranks, whose failure names the rank that waited."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vicreg_kernels.distributed.groups import by_name

# torch 2.13 renames it.
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


@contextlib.contextmanager
def collective(op: str, group: Any) -> Iterator[None]:
    """A context for a collective. An error names the op, the rank that waited, and the ranks that
    are absent.
    """
    try:
        yield
    except RuntimeError as error:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(
            f"{op}: rank {rank} of {ranks} waited for the others, and at least one did not come: "
            f"it failed, ended, or did not call {op} within the group's timeout; "
            f"{_roll_call(group)} ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    """Without the frames that torch appends."""
    return (str(error).splitlines() or [""])[0]


# Seconds that the ranks of a failed collective have to say that they are there.
ROLL_CALL = timedelta(seconds=2)
_roll_calls: Counter[str] = Counter()


def _roll_call(group: Any) -> str:
    """Which ranks have failed in this collective too, and so are alive; asked of the group's store,
    which does not need the connections that have just failed.
    """
    name, ranks = group.group_name, dist.get_world_size(group)
    _roll_calls[name] += 1
    prefix = f"vicreg_kernels/{name}/{_roll_calls[name]}"
    own = f"{prefix}/{dist.get_rank(group)}"
    silent = []
    try:
        store = dist.distributed_c10d._world.pg_map[group][1]
        store.set(own, "")
        until = time.monotonic() + ROLL_CALL.total_seconds()
        for rank in range(ranks):
            left = max(timedelta(seconds=until - time.monotonic()), timedelta(milliseconds=1))
            try:
                store.wait([f"{prefix}/{rank}"], left)
            except RuntimeError:
                store.check([own])  # raises where the store itself is gone
                silent.append(str(rank))
    except (RuntimeError, KeyError) as error:
        return f"the group's store, as a rule rank 0's, does not answer: {_first_line(error)}"
    if not silent:
        return "all ranks are alive"
    return f"no sign of rank {', '.join(silent)}"


class Pending(NamedTuple):
    """A collective that has been started; `wait` returns its result."""

    op: str
    group: Any
    work: Any
    value: Tensor

    def wait(self) -> Tensor:
        with collective(self.op, self.group):
            self.work.wait()
        return self.value


def sum_ranks_(op: str, group: Any, value: Tensor) -> Tensor:
    """Sum `value`, which is contiguous, over the ranks in place."""
    return start_sum_ranks_(op, group, value).wait()


def start_sum_ranks_(op: str, group: Any, value: Tensor) -> Pending:
    """Start `sum_ranks_` without waiting for it."""
    with collective(op, group):
        work = dist.all_reduce(value, group=group, async_op=True)
    return Pending(op, group, work, value)


def gather_rows(
    op: str, group: Any, own: Tensor, rows: list[int], out: Tensor | None = None
) -> Tensor:
    """Gather every rank's rows, in the order of ranks: [ranks * max(rows), ...]. Each rank's rows
    are padded with zero rows to the longest. own: [rows of this rank, ...]; out: the contiguous
    tensor to write to, or None.
    """
    return start_gather_rows(op, group, own, rows, out).wait()


def start_gather_rows(
    op: str, group: Any, own: Tensor, rows: list[int], out: Tensor | None = None
) -> Pending:
    """Start `gather_rows` without waiting for it."""
    longest = max(rows)
    if own.shape[0] < longest:
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: own.shape[0]] = own
        own = padded
    if out is None:
        out = own.new_empty((len(rows) * longest, *own.shape[1:]))
    with collective(op, group):
        work = all_gather(out, own.contiguous(), group=group, async_op=True)
    return Pending(op, group, work, out)


def gather_differentiable(op: str, name: str, own: Tensor, rows: list[int]) -> Tensor:
    """Gather every rank's rows without padding, differentiably to any order: [sum(rows), ...]. The
    gradient of this rank's rows is the sum of all ranks' gradients for them.
    """
    return _Gather.apply(own, op, name, tuple(rows))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, op: str, name: str, rows: tuple[int, ...]) -> Tensor:
        ctx.where = (op, name, rows)
        padded = gather_rows(op, by_name(name), own, list(rows))
        parts = padded.unflatten(0, (len(rows), max(rows)))
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _OwnOfSum.apply(grad, *ctx.where), None, None, None


class _OwnOfSum(torch.autograd.Function):
    """This rank's rows of the sum over ranks: the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, every: Tensor, op: str, name: str, rows: tuple[int, ...]) -> Tensor:
        ctx.where = (op, name, rows)
        group = by_name(name)
        total = sum_ranks_(op, group, every.clone(memory_format=torch.contiguous_format))
        return total.split(rows)[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Gather.apply(grad, *ctx.where), None, None, None
