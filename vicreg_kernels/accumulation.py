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
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vicreg_kernels.core import module_state
from vicreg_kernels.core.module_state import Undo

# Relative differences of two passes that rounding explains: kernels that add up in another order,
# graphs compiled apart. Under autocast embeddings are as inexact as half precision.
SINGLE, HALF = 1e-3, 5e-2


def accumulate(
    loss: Callable[..., Tensor],
    encoder: Callable[..., Any],
    micro_batches: Sequence[Any],
    *,
    modules: Sequence[nn.Module] | None = None,
    scaler: Any = None,
) -> Tensor:
    """Add the gradient of the whole batch's loss to the `.grad` of the encoder's parameters.

    It replaces `loss(...).backward()`. The gradient is the one that results if all micro-batches
    are encoded one after the other under one graph. Both passes encode a micro-batch from the same
    random state, so that dropout draws the same masks. The modules' state afterwards is the one
    that a single pass leaves: buffers such as batch norm's running statistics, also reassigned
    ones, and plain attributes such as tensors, counters, lists and generators. Batch norm in
    training mode normalises each micro-batch by its own statistics, as in ordinary accumulation;
    every other encoder gets exactly the whole batch's gradient.

    Args:
        loss: a function of the whole batch's embeddings that returns a 0-d tensor. It has one
            argument for each tensor that the encoder returns for a micro-batch, concatenated along
            dimension 0. If it has a `process_group`, the batch is that of all ranks.
        encoder: usually an nn.Module. A DistributedDataParallel communicates only in the backward
            of the last micro-batch. If ranks have different numbers of micro-batches, it must not
            broadcast buffers: see docs/accumulation.md.
        micro_batches: list or tuple. Each is a tensor (one call of the encoder), a tuple or list of
            tensors (one call for each, say two views), or anything else (one call, which returns
            a tensor or a tuple or list of tensors).
        modules: the modules that the encoder runs; None: the encoder itself, or the module that it
            is a method of. Needed if the encoder is a function that calls modules with state.
        scaler: a torch.amp.GradScaler, for float16 autocast: its scale multiplies the gradient.

    Returns:
        The loss of the whole batch, detached.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, and no gradient has
            changed. After any error the modules' state is what it was before the call.
        RuntimeError: the embeddings of the two passes differ by more than rounding explains (1e-3
            of their norm, 5e-2 in half precision or under autocast), so the encoder has state that
            is not restored. The gradients have changed then.
    """
    _check(loss, encoder, micro_batches)
    modules = _modules_of(encoder) if modules is None else list(modules)
    _check_modules(modules)
    put_back = module_state.keep(modules)
    random: list[list[Undo]] = []
    embeddings: list[tuple[Tensor, ...]] = []
    try:
        with torch.no_grad():
            for batch in micro_batches:
                random.append(module_state.random_states(module_state.devices_of(batch)))
                embeddings.append(_encode(encoder, batch))
        _check_embeddings(embeddings)
        whole = [torch.cat(parts).requires_grad_() for parts in zip(*embeddings, strict=True)]
        rows = [[z.shape[0] for z in parts] for parts in zip(*embeddings, strict=True)]
        del embeddings
        value, grads = _loss_and_gradient(loss, whole, scaler)
        pairs = [_by_micro_batch(parts, rows) for parts in (whole, grads)]
        del whole, grads
        put_back()  # the second pass repeats the first, also in what it does to the modules
        with _random_states_kept(micro_batches), torch.enable_grad():
            _second_pass(encoder, micro_batches, modules, random, *pairs)
    except BaseException:
        put_back()
        raise
    return value


def _by_micro_batch(whole: Sequence[Tensor], rows: list[list[int]]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(z.detach().split(r) for z, r in zip(whole, rows, strict=True)), strict=True))


def _second_pass(
    encoder: Callable[..., Any],
    micro_batches: Sequence[Any],
    modules: list[nn.Module],
    random: list[list[Undo]],
    embeddings: list[tuple[Tensor, ...]],
    pieces: list[tuple[Tensor, ...]],
) -> None:
    """The micro-batches once more; embeddings: what the first pass gave, pieces: its gradient."""
    last = len(micro_batches) - 1
    differences = []
    for i, (batch, first, piece) in enumerate(zip(micro_batches, embeddings, pieces, strict=True)):
        for put_back in random[i]:
            put_back()
        with _no_sync(modules) if i < last else contextlib.nullcontext():
            differences.append(_backward(encoder, batch, first, piece, i))
    _check_differences(differences)


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
    first: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    i: int,
) -> Tensor:
    """The difference of the embeddings from the first ones, as `_difference` gives it."""
    embeddings = _encode(encoder, batch)
    if [z.shape for z in embeddings] != [z.shape for z in first]:
        raise RuntimeError(
            f"encoder: gave {[tuple(z.shape) for z in embeddings]} for micro_batches[{i}] in the "
            f"second pass and {[tuple(z.shape) for z in first]} in the first"
        )
    pairs = [(z, g) for z, g in zip(embeddings, grads, strict=True) if z.requires_grad]
    if not pairs:
        raise ValueError(f"encoder: no embedding of micro_batches[{i}] requires a gradient")
    difference = _difference(first, embeddings)
    torch.autograd.backward([z for z, _ in pairs], [g for _, g in pairs])
    return difference


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """0-d, on the device: the largest |second - first| / |first| by tensor, over what its dtype's
    arithmetic explains. NaN where the first is not finite, as in a step that a scaler skips.
    """
    differences = []
    for a, b in zip(first, second, strict=True):
        a, b = a.detach(), b.detach()
        wide = torch.promote_types(a.dtype, torch.float32)
        size = torch.linalg.vector_norm(a, dtype=wide)
        apart = torch.linalg.vector_norm(b - a, dtype=wide)
        apart = torch.where(apart.isnan() & size.isfinite(), torch.inf, apart)
        half = a.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(
            a.device.type
        )
        differences.append(
            apart / size.clamp_min(torch.finfo(wide).tiny) / (HALF if half else SINGLE)
        )
    return torch.stack([x.to(differences[0]) for x in differences]).max()


def _check_differences(differences: Sequence[Tensor]) -> None:
    """One look at the device's values for all micro-batches."""
    for i, excess in enumerate(torch.stack(list(differences)).tolist()):
        if excess > 1.0:
            raise RuntimeError(
                f"encoder: gave other embeddings for micro_batches[{i}] in the second pass than in "
                "the first, so that the gradients just added are wrong: set them to zero. Either "
                "name the modules whose state it changes in modules=, or keep its state in their "
                "buffers and attributes; state elsewhere (objects, globals, the input itself) must "
                "not change within a step"
            )


def _modules_of(encoder: Any) -> list[nn.Module]:
    """The modules that an encoder obviously runs: itself, or the one that it is a method of."""
    while isinstance(encoder, functools.partial):
        encoder = encoder.func
    owner = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


def _check_modules(modules: list[nn.Module]) -> None:
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules: got {type(module).__name__} at {i}, takes torch.nn.Modules")
    lazy = module_state.uninitialized(modules)
    if lazy is not None:
        raise ValueError(f"encoder: {lazy} has no shape yet, takes lazy modules that have run once")
    if any(ddp.static_graph for ddp in _distributed(modules)):
        raise ValueError(
            "encoder: got DistributedDataParallel with static_graph=True, which cannot leave "
            "gradients unsynchronised; takes static_graph=False (find_unused_parameters=True where "
            "a step leaves parameters out)"
        )
    if parametrize._cache_enabled:
        raise RuntimeError(
            "encoder: called under torch.nn.utils.parametrize.cached(), which would keep the first "
            "pass's weights, made without a graph; call accumulate outside it"
        )


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


def _check_embeddings(embeddings: list[tuple[Tensor, ...]]) -> None:
    first = embeddings[0]
    for i, parts in enumerate(embeddings):
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


@contextlib.contextmanager
def _random_states_kept(micro_batches: Sequence[Any]) -> Iterator[None]:
    """Puts the generators back where the first pass and the loss left them."""
    after = module_state.random_states(module_state.devices_of(list(micro_batches)))
    try:
        yield
    finally:
        for put_back in after:
            put_back()


def _distributed(modules: Sequence[nn.Module]) -> list[nn.parallel.DistributedDataParallel]:
    kind = nn.parallel.DistributedDataParallel
    return [module for module in module_state.owners(modules) if isinstance(module, kind)]


@contextlib.contextmanager
def _no_sync(modules: Sequence[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in _distributed(modules):
            stack.enter_context(module.no_sync())
        yield
