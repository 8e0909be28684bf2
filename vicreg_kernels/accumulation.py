"""Gradient caching: a batch-statistic loss of a batch that does not fit, exactly.

A loss of batch statistics is not the mean of its micro-batches' losses, so ordinary gradient
accumulation trains another loss. Here every micro-batch is encoded without a graph, the loss of all
embeddings together gives the gradient of each, and every micro-batch is encoded again, with a
graph, to carry its embeddings' gradients on to the parameters (Gao et al., 2021, arXiv:2101.06983,
who do it for contrastive losses). Memory holds one micro-batch's activations and all embeddings;
the price is a second forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def accumulate(
    loss: Callable[..., Tensor],
    encoder: Callable[..., Any],
    micro_batches: Sequence[Any],
    *,
    modules: Sequence[nn.Module] | None = None,
    scaler: Any = None,
) -> Tensor:
    """Adds the gradient of `loss` of the whole batch to the `.grad` of the encoder's parameters.

    Takes the place of `loss(...).backward()`. The gradient is that of the micro-batches encoded one
    after the other under one graph: each is encoded from the same random state in both passes, so
    that dropout draws the same masks, and buffers such as batch norm's running statistics end as
    one pass leaves them. Batch norm in training mode normalises each micro-batch by its own
    statistics, as in ordinary accumulation; every other encoder gets exactly the whole batch's
    gradient.

    Args:
        loss: of the embeddings of the whole batch, one argument for each tensor that the encoder
            gives a micro-batch, each concatenated along dimension 0; returns a 0-d tensor. With a
            `process_group` in it the batch is that of all ranks.
        encoder: usually an nn.Module. A DistributedDataParallel communicates in the last
            micro-batch's backward only; where ranks have different numbers of micro-batches it
            takes broadcast_buffers=False.
        micro_batches: list or tuple. Each is a tensor (one call of the encoder), a tuple or list of
            tensors (one call for each, say two views), or anything else (one call, which returns
            a tensor or a tuple or list of tensors).
        modules: the modules that the encoder runs; None: the encoder itself, if it is one. Needed
            where the encoder is a function around such a module or one with buffers.
        scaler: a torch.amp.GradScaler, for float16 autocast: its scale multiplies the gradient.

    Returns:
        The loss of the whole batch, detached.

    Raises:
        TypeError, ValueError: naming the argument; no gradient has changed then.
        RuntimeError: the second pass gave other shapes than the first.
    """
    _check(loss, encoder, micro_batches)
    if modules is None:
        modules = [encoder] if isinstance(encoder, nn.Module) else []
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    random, found = [], []
    try:
        with torch.no_grad():
            for batch in micro_batches:
                random.append(_random_states(_devices(batch)))
                found.append(_encode(encoder, batch))
        _check_embeddings(found)
        shapes = [[z.shape for z in parts] for parts in found]
        whole = [torch.cat(parts).requires_grad_() for parts in zip(*found, strict=True)]
        del found
        value, grads = _loss_and_gradient(loss, whole, scaler)
        del whole
    except BaseException:
        _put(buffers, before)
        raise
    rows = [[shape[0] for shape in parts] for parts in zip(*shapes, strict=True)]
    pieces = zip(*(grad.split(r) for grad, r in zip(grads, rows, strict=True)), strict=True)

    _put(buffers, before)  # the second pass repeats the first, also in what it does to them
    last = len(micro_batches) - 1
    with _random_states_kept(random), torch.enable_grad():
        for i, (batch, piece) in enumerate(zip(micro_batches, pieces, strict=True)):
            _set_random_states(random[i])
            with _no_sync(modules) if i < last else contextlib.nullcontext():
                _backward(encoder, batch, piece, shapes[i], i)
    return value


def _loss_and_gradient(
    loss: Callable[..., Tensor], whole: list[Tensor], scaler: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        value = loss(*whole)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: returned {got}, takes a function that returns a 0-d tensor")
        if not value.requires_grad:
            raise ValueError("loss: does not depend on the embeddings, takes one that does")
        scaled = value if scaler is None else scaler.scale(value)
    grads = torch.autograd.grad(scaled, whole, allow_unused=True, materialize_grads=True)
    return value.detach(), grads


def _backward(
    encoder: Callable[..., Any],
    batch: Any,
    grads: tuple[Tensor, ...],
    shapes: list[torch.Size],
    i: int,
) -> None:
    embeddings = _encode(encoder, batch)
    if [z.shape for z in embeddings] != shapes:
        raise RuntimeError(
            f"encoder: gave {[tuple(z.shape) for z in embeddings]} for micro_batches[{i}] in the "
            f"second pass and {[tuple(shape) for shape in shapes]} in the first"
        )
    pairs = [(z, g) for z, g in zip(embeddings, grads, strict=True) if z.requires_grad]
    if not pairs:
        raise ValueError(f"encoder: no embedding of micro_batches[{i}] requires a gradient")
    torch.autograd.backward([z for z, _ in pairs], [g for _, g in pairs])


def _check(loss: Any, encoder: Any, micro_batches: Any) -> None:
    for name, value in (("loss", loss), ("encoder", encoder)):
        if not callable(value):
            raise TypeError(f"{name}: got {type(value).__name__}, takes a callable")
    if isinstance(micro_batches, Tensor) or not isinstance(micro_batches, Sequence):
        raise TypeError(
            f"micro_batches: got {type(micro_batches).__name__}, takes a list or tuple, which is "
            "read twice; tensor.split(rows) makes one of a tensor"
        )
    if not micro_batches:
        raise ValueError("micro_batches: got none, takes at least one")


def _check_embeddings(found: list[tuple[Tensor, ...]]) -> None:
    first = found[0]
    for i, parts in enumerate(found):
        for z in parts:
            if not isinstance(z, Tensor) or z.dim() < 1:
                raise TypeError(
                    f"encoder: gave {type(z).__name__} for micro_batches[{i}], takes one that "
                    "gives tensors whose dimension 0 is the batch"
                )
        here = [(z.shape[1:], z.dtype) for z in parts]
        there = [(z.shape[1:], z.dtype) for z in first]
        if here != there:
            raise ValueError(
                f"encoder: gave {_described(parts)} for micro_batches[{i}] and {_described(first)} "
                "for micro_batches[0], takes the same but for dimension 0"
            )


def _described(parts: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(z.shape)} {z.dtype}" for z in parts)


def _encode(encoder: Callable[..., Any], batch: Any) -> tuple[Tensor, ...]:
    if isinstance(batch, (tuple, list)):
        return tuple(encoder(view) for view in batch)
    z = encoder(batch)
    return tuple(z) if isinstance(z, (tuple, list)) else (z,)


def _devices(value: Any) -> set[torch.device]:
    """The devices with generators of their own that tensors in value, nested in any way, lie on."""
    if isinstance(value, Tensor):
        return {value.device} if value.device.type not in ("cpu", "meta") else set()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return set().union(*map(_devices, value))
    return set()


def _random_states(devices: set[torch.device]) -> dict[torch.device, Tensor]:
    """The states of the CPU's generator and the devices'; also of the current CUDA device, to which
    an encoder may move its input.
    """
    if torch.cuda.is_initialized():
        devices = devices | {torch.device("cuda", torch.cuda.current_device())}
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def _random_states_kept(states: list[dict[torch.device, Tensor]]) -> Iterator[None]:
    """Puts the generators back where the first pass and the loss left them."""
    devices = {device for found in states for device in found if device.type != "cpu"}
    after = _random_states(devices)
    try:
        yield
    finally:
        _set_random_states(after)


def _put(buffers: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


@contextlib.contextmanager
def _no_sync(modules: Sequence[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield
