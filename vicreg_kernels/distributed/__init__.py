"""What ranks exchange.

A loss with a `process_group` is the loss of the batch that all its ranks hold together, the same
number on every rank. Its gradient is that batch's gradient times the number of ranks, each rank
holding its own rows': DistributedDataParallel averages over ranks, and the mean is then exactly the
gradient of one process with the whole batch (docs/distributed.md).

Every such call begins with a small message from each rank to all: what it is about to compute, on
how many rows, or why it cannot. Where one differs or has failed, all of them raise.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vicreg_kernels.core import dispatch, library

T = TypeVar("T")

# Bytes of a rank's message, and the most characters of a value in it; longer ones are cut.
MESSAGE_BYTES = 2048
LONGEST_VALUE = 160
LONGEST_ERROR = 480

# torch 2.13 renames it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def resolve(process_group: Any) -> Any:
    """The group to communicate in, None for none: None and False, and a group of one rank.

    process_group: None, False, True (the default group) or a torch.distributed.ProcessGroup that
    this rank belongs to.

    Raises TypeError, ValueError or RuntimeError naming process_group.
    """
    if process_group is None or process_group is False:
        return None
    if not dist.is_available():
        raise RuntimeError("process_group: this torch is built without torch.distributed")
    if process_group is True:
        if not dist.is_initialized():
            raise RuntimeError(
                "process_group: got True, but there is no default group: call "
                "torch.distributed.init_process_group first"
            )
        process_group = dist.group.WORLD
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: got a group that this rank does not belong to")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: got {type(process_group).__name__}, takes None, True or a "
            "torch.distributed.ProcessGroup"
        )
    return process_group if dist.get_world_size(process_group) > 1 else None


def choose_backend(backend: str | None, dtype: torch.dtype) -> str:
    """ "ranks" or "reference": what runs for `backend` with a process group.

    Raises ValueError for another named backend.
    """
    dispatch.check_backend(backend)
    named = backend if backend is not None else dispatch.ENVIRONMENT_BACKEND
    if named not in (None, "reference"):
        source = "backend" if backend is not None else "VICREG_KERNELS_BACKEND"
        raise ValueError(
            f"{source}: got {named!r}, takes None or 'reference' with a process_group: a rank's "
            "share is a rectangular product of its rows with all rows, which torch's own matmul "
            "does on every device; the fused backends know the square ones of one process"
        )
    return "reference" if named or dtype == torch.float64 else "ranks"


@library.constant_in_graphs
def group_name(process_group: Any) -> str | None:
    """The name of `resolve(process_group)`, as ops take it; None for none. A constant of a compiled
    graph.
    """
    group = resolve(process_group)
    return None if group is None else group.group_name


def by_name(name: str) -> Any:
    """The group whose `group_name` an op was given."""
    return dist.distributed_c10d._resolve_process_group(name)


@contextlib.contextmanager
def announcing(op: str, group: Any) -> Iterator[None]:
    """Around the checks that precede `agree`: what they raise is told to the other ranks, which
    raise too instead of waiting. With group None it does nothing.
    """
    try:
        yield
    except Exception as error:
        if group is not None:
            with contextlib.suppress(RuntimeError):  # the error itself matters more
                _exchange(group, op, {"error": _short(error, LONGEST_ERROR)})
        raise


def checked(op: str, name: str | None, check: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """check(*args, **kwargs), whose errors are told to the ranks of the group called `name`.

    Under torch.compile checks run while a rank traces, when the others expect no message: they
    raise on that rank alone, and the others at the group's timeout.
    """
    if name is None or torch.compiler.is_compiling():
        return check(*args, **kwargs)
    with announcing(op, by_name(name)):
        return check(*args, **kwargs)


def agree(group: Any, op: str, rows: int, facts: Mapping[str, Any]) -> list[int]:
    """The rows of each rank, once all have shown that they call `op` with the same `facts`.

    facts: name of an argument -> what must be the same on every rank; compared as text.

    Raises RuntimeError on every rank where a rank has failed, has not come within the group's
    timeout, or is about to compute something else.
    """
    mine = {"op": op, **{name: _short(value, LONGEST_VALUE) for name, value in facts.items()}}
    found = _exchange(group, op, {"rows": rows, "facts": mine})
    for rank, message in enumerate(found):
        if "error" in message:
            raise RuntimeError(f"{op}: rank {rank} failed: {message['error']}")
    first = found[0]["facts"]
    for rank, message in enumerate(found):
        for name in {**first, **message["facts"]}:
            here, there = message["facts"].get(name), first.get(name)
            if here != there:
                raise RuntimeError(
                    f"{op}: {name}: got {here} on rank {rank} and {there} on rank 0, takes the "
                    "same on every rank"
                )
    return [int(message["rows"]) for message in found]


def _short(value: Any, longest: int) -> str:
    text = str(value).encode("ascii", "replace").decode()
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _exchange(group: Any, op: str, message: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's message, in the order of ranks; one all-gather of fixed size."""
    text = json.dumps(message).encode().ljust(MESSAGE_BYTES, b" ")
    assert len(text) == MESSAGE_BYTES, message
    own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    ranks = dist.get_world_size(group)
    device = _message_device(group)
    everyone = torch.empty(ranks * MESSAGE_BYTES, dtype=torch.uint8, device=device)
    with collective(op, group):
        _all_gather(everyone, own.to(device), group=group)
    return [json.loads(row.tobytes()) for row in everyone.cpu().view(ranks, -1).numpy()]


def _message_device(group: Any) -> torch.device:
    """The CPU where the group serves it (gloo, or "cpu:gloo,cuda:nccl", torch's default): messages
    then wait for the other hosts but not for the device.
    """
    served = str(dist.get_backend_config(group))
    return torch.device("cpu" if "cpu:" in served else "cuda")


@contextlib.contextmanager
def collective(op: str, group: Any) -> Iterator[None]:
    """Around a collective: its failure names the op, the rank that waited, and those that are not
    there.
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
    """A collective under way; `wait` gives its result."""

    op: str
    group: Any
    work: Any
    value: Tensor

    def wait(self) -> Tensor:
        with collective(self.op, self.group):
            self.work.wait()
        return self.value


def sum_ranks_(op: str, group: Any, value: Tensor) -> Tensor:
    """value, contiguous, summed over the ranks in place."""
    return start_sum_ranks_(op, group, value).wait()


def start_sum_ranks_(op: str, group: Any, value: Tensor) -> Pending:
    """`sum_ranks_` that is waited for later."""
    with collective(op, group):
        work = dist.all_reduce(value, group=group, async_op=True)
    return Pending(op, group, work, value)


def gather_rows(
    op: str, group: Any, own: Tensor, rows: list[int], out: Tensor | None = None
) -> Tensor:
    """[ranks * max(rows), ...]: every rank's rows (own: [rows of this rank, ...]) in the order of
    ranks, each rank's followed by zero rows up to the longest. out: where they go, contiguous.
    """
    return start_gather_rows(op, group, own, rows, out).wait()


def start_gather_rows(
    op: str, group: Any, own: Tensor, rows: list[int], out: Tensor | None = None
) -> Pending:
    """`gather_rows` that is waited for later."""
    longest = max(rows)
    if own.shape[0] < longest:
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: own.shape[0]] = own
        own = padded
    if out is None:
        out = own.new_empty((len(rows) * longest, *own.shape[1:]))
    with collective(op, group):
        work = _all_gather(out, own.contiguous(), group=group, async_op=True)
    return Pending(op, group, work, out)


def check_same(op: str, group: Any, name: str, value: Tensor) -> None:
    """Raise on every rank where value, of the same shape on all, is not the same on all."""
    own = value.detach().flatten()
    every = gather_rows(op, group, own, [own.numel()] * dist.get_world_size(group))
    for rank, theirs in enumerate(every.view(-1, own.numel())):
        if not torch.equal(theirs, every[: own.numel()]) and not theirs.isnan().any():
            raise RuntimeError(
                f"{op}: {name}: got {theirs.tolist()} on rank {rank} and "
                f"{every[: own.numel()].tolist()} on rank 0, takes the same on every rank"
            )


def gather_differentiable(op: str, name: str, own: Tensor, rows: list[int]) -> Tensor:
    """[sum(rows), ...]: every rank's rows, without padding, differentiable to any order. The
    gradient of own rows is the sum over the ranks of what each has for them.
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
