"""Tensors that are kept from call to call: with a bound, and only what outlasts the call.

What a mode makes (fake tensors, inference mode, a transform of torch.func, a traced graph, a CUDA
graph being captured, whose kernels have not run yet) is of use inside that mode alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import RLock

import torch
from torch import Tensor


def inside_a_mode() -> bool:
    """Whether a tensor made now may be usable only inside a mode. Inference mode does not count."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def lasts(value: Tensor) -> bool:
    """Whether a tensor made outside a mode can be kept."""
    if type(value) is not Tensor or value.is_inference():
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


class Kept:
    """A cache of tensors by key, which drops the least recently used first.

    Args:
        entries: the most tensors that it holds.
        nbytes: the most bytes that they have together; a larger tensor is not kept.
    """

    def __init__(self, entries: int, nbytes: int) -> None:
        self.entries, self.nbytes = entries, nbytes
        self.held: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.bytes = 0
        self.lock = RLock()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the kept tensor of this key, or that of make(), which depends only on the key."""
        if inside_a_mode():
            return make()
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
            with torch.inference_mode(False):
                value = make()
            if lasts(value) and value.nbytes <= self.nbytes:
                self._hold(key, value)
        return value

    def _hold(self, key: Hashable, value: Tensor) -> None:
        self.held[key] = value
        self.bytes += value.nbytes
        while len(self.held) > self.entries or self.bytes > self.nbytes:
            self.bytes -= self.held.popitem(last=False)[1].nbytes
