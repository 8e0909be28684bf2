"""What ranks tell each other before they compute: that all compute the same, or why one cannot."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vicreg_kernels.core import dispatch
from vicreg_kernels.distributed import collectives
from vicreg_kernels.distributed.collectives import collective, gather_rows
from vicreg_kernels.distributed.groups import by_name

T = TypeVar("T")

# Bytes of a rank's message, and the most characters of a value in it; longer ones are cut.
MESSAGE_BYTES = 2048
LONGEST_VALUE = 160
LONGEST_ERROR = 480


@contextlib.contextmanager
def tell_other_ranks_of_errors(op: str, group: Any) -> Iterator[None]:
    """A context for the checks that precede `agree`: if they raise, the other ranks are told, and
    raise too instead of waiting. If group is None it does nothing.
    """
    try:
        yield
    except Exception as error:
        if group is not None:
            with contextlib.suppress(RuntimeError):  # the error itself matters more
                _exchange(group, op, {"error": _short(error, LONGEST_ERROR)})
        raise


def check_on_all_ranks(
    op: str, name: str | None, check: Callable[..., T], *args: Any, **kwargs: Any
) -> T:
    """Call check(*args, **kwargs); if it raises, tell the other ranks of the group called `name`.
    Transforms of torch.func and forward-mode derivatives are refused: collectives have no rule for
    them, and would leave out the other ranks' part without a word.

    Under torch.compile, checks run while a rank traces, when the others expect no message. They
    then raise on that rank only, and the others raise at the group's timeout.
    """
    if name is None or torch.compiler.is_compiling():
        return check(*args, **kwargs)
    with tell_other_ranks_of_errors(op, by_name(name)):
        if dispatch.transformed():
            raise RuntimeError(
                "process_group: got several ranks inside a transform of torch.func or of "
                "forward-mode derivatives, takes None there"
            )
        return check(*args, **kwargs)


def agree(group: Any, op: str, rows: int, facts: Mapping[str, Any]) -> list[int]:
    """Return the rows of each rank, after all have shown that they call `op` with the same `facts`.

    facts: name of an argument -> what must be the same on every rank; compared as text.

    Raises RuntimeError on every rank if one rank has failed, did not come within the group's
    timeout, or is about to compute something else.
    """
    mine = {"op": op, **{name: _short(value, LONGEST_VALUE) for name, value in facts.items()}}
    messages = _exchange(group, op, {"rows": rows, "facts": mine})
    for rank, message in enumerate(messages):
        if "error" in message:
            raise RuntimeError(f"{op}: rank {rank} failed: {message['error']}")
    first = messages[0]["facts"]
    for rank, message in enumerate(messages):
        for name in {**first, **message["facts"]}:
            here, there = message["facts"].get(name), first.get(name)
            if here != there:
                raise RuntimeError(
                    f"{op}: {name}: got {here} on rank {rank} and {there} on rank 0, takes the "
                    "same on every rank"
                )
    return [int(message["rows"]) for message in messages]


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
        collectives.all_gather(everyone, own.to(device), group=group)
    return [json.loads(row.tobytes()) for row in everyone.cpu().view(ranks, -1).numpy()]


def _message_device(group: Any) -> torch.device:
    """The CPU where the group serves it (gloo, or "cpu:gloo,cuda:nccl", torch's default): messages
    then wait for the other hosts but not for the device.
    """
    served = str(dist.get_backend_config(group))
    return torch.device("cpu" if "cpu:" in served else "cuda")


def check_same(op: str, group: Any, name: str, value: Tensor) -> None:
    """Raise on every rank if `value`, of the same shape on all, is not the same on all."""
    own = value.detach().flatten()
    every = gather_rows(op, group, own, [own.numel()] * dist.get_world_size(group))
    for rank, theirs in enumerate(every.view(-1, own.numel())):
        if not torch.equal(theirs, every[: own.numel()]) and not theirs.isnan().any():
            raise RuntimeError(
                f"{op}: {name}: got {theirs.tolist()} on rank {rank} and "
                f"{every[: own.numel()].tolist()} on rank 0, takes the same on every rank"
            )
