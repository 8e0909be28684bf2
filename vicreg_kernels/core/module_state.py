"""What a forward pass may change in modules, kept so that the pass can be run again from there.

Kept by owner: what each name in a module's buffers and parameters is bound to, since a forward may
assign a new tensor to a buffer; what its plain attributes are bound to (tensors, numbers, strings,
generators, lists, dicts); and the contents of all of these but parameters.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

Undo = Callable[[], None]

_SCALARS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, dict, set, deque)
_STATE = (Tensor, torch.Generator, tuple, *_SCALARS, *_CONTAINERS)
# The attributes of nn.Module itself: hooks, the mode, and the three dicts.
_OWN = frozenset(nn.Module().__dict__)
_ABSENT = object()


def owners(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield each module of the trees once."""
    seen: set[int] = set()
    for root in modules:
        for module in root.modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def uninitialized(modules: Iterable[nn.Module]) -> str | None:
    """The name of a lazy parameter or buffer that has no shape yet, or None."""
    for module in owners(modules):
        for entries in (module._parameters, module._buffers):
            for name, tensor in entries.items():
                if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
                    return f"{type(module).__name__}.{name}"
    return None


def keep(modules: Iterable[nn.Module]) -> Undo:
    """Return a function that restores the modules' state to what it is now, any number of times.

    FSDP moves parameters and attributes in its forward, so in a tree with FSDP only buffers are
    restored. The attributes of torch's own modules, which hold no such state, are not restored.
    """
    modules = list(modules)
    every = list(owners(modules))
    sharded = any(_is_sharded(module) for module in every)
    undo: list[Undo] = []
    memo: dict[int, Undo] = {}
    for module in every:
        undo.append(_entries(module._buffers, memo))
        if sharded:
            continue
        undo.append(_bindings(module._parameters))
        if not type(module).__module__.startswith("torch."):
            undo.append(_attributes(module.__dict__, memo))

    def back() -> None:
        with torch.no_grad():
            for put in undo:
                put()

    return back


def _is_sharded(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("torch.distributed.fsdp") for cls in type(module).__mro__)


def _bindings(entries: dict[str, Any]) -> Undo:
    before = dict(entries)

    def put() -> None:
        if entries.keys() != before.keys() or any(entries[k] is not v for k, v in before.items()):
            entries.clear()
            entries.update(before)

    return put


def _entries(entries: dict[str, Any], memo: dict[int, Undo]) -> Undo:
    """The names and what they are bound to, and the contents of that."""
    inner = _all_contents(entries.values(), memo)
    bound = _bindings(entries)

    def put() -> None:
        bound()
        for each in inner:
            each()

    return put


def _attributes(attributes: dict[str, Any], memo: dict[int, Undo]) -> Undo:
    """The plain state among a module's attributes; other objects stay as the passes leave them."""
    before = {k: v for k, v in attributes.items() if k not in _OWN and isinstance(v, _STATE)}
    inner = _all_contents(before.values(), memo)

    def put() -> None:
        for name in [k for k, v in attributes.items() if k not in _OWN and isinstance(v, _STATE)]:
            if name not in before:
                del attributes[name]
        for name, value in before.items():
            if attributes.get(name, _ABSENT) is not value:
                attributes[name] = value
        for each in inner:
            each()

    return put


def _all_contents(values: Iterable[Any], memo: dict[int, Undo]) -> list[Undo]:
    undos = (_contents(value, memo) for value in values)
    return [each for each in undos if each is not None]


def _contents(value: Any, memo: dict[int, Undo]) -> Undo | None:
    """A function that puts back the contents of value; None where they cannot change or, for
    parameters, are not kept.
    """
    if id(value) in memo:
        return None  # put back by its first owner
    undo: Undo | None
    if isinstance(value, Tensor):
        undo = None if isinstance(value, nn.Parameter) else _tensor(value)
    elif isinstance(value, torch.Generator):
        undo = partial(value.set_state, value.get_state())
    elif isinstance(value, (tuple, *_CONTAINERS)):
        memo[id(value)] = _nothing  # a container that holds itself
        undo = _container(value, memo)
    else:
        return None
    if undo is not None:
        memo[id(value)] = undo
    return undo


def _nothing() -> None:
    pass


def _tensor(tensor: Tensor) -> Undo | None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return None  # nothing can change it out here
    before = tensor.detach().clone()

    def put() -> None:
        if tensor.shape == before.shape and tensor.dtype == before.dtype:
            tensor.copy_(before)
        else:  # resized, or other data
            tensor.data = before.clone()

    return put


def _container(value: Any, memo: dict[int, Undo]) -> Undo:
    items = list(value.items()) if isinstance(value, dict) else list(value)
    parts = [item for _, item in items] if isinstance(value, dict) else items
    inner = _all_contents(parts, memo)

    def put() -> None:
        if isinstance(value, list):
            value[:] = items
        elif not isinstance(value, tuple):
            value.clear()
            if isinstance(value, deque):
                value.extend(items)
            else:
                value.update(items)
        for each in inner:
            each()

    return put


def random_states(devices: set[torch.device]) -> list[Undo]:
    """Return functions that restore the random generators: Python's, numpy's, and torch's of the
    CPU, of `devices`, and of the current CUDA device, to which an encoder may move its input.
    """
    states: list[Undo] = [
        partial(random.setstate, random.getstate()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        states.append(partial(numpy.random.set_state, numpy.random.get_state()))
    if torch.cuda.is_initialized():
        devices = devices | {torch.device("cuda", torch.cuda.current_device())}
    for device in devices:
        of = torch.get_device_module(device)
        states.append(partial(of.set_rng_state, of.get_rng_state(device), device))
    return states


def devices_of(value: Any) -> set[torch.device]:
    """The devices, apart from the CPU, of the tensors in `value`, which may be nested."""
    if isinstance(value, Tensor):
        return {value.device} if value.device.type not in ("cpu", "meta") else set()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return set().union(*map(devices_of, value))
    return set()
