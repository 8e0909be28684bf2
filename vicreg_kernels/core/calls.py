"""What a call costs the host, kept small: the dispatcher and the checks are skipped where nobody
can tell.

An op registered from Python costs about 9 us a call above its kernel, because the dispatcher boxes
and unboxes every argument on the way into Python. Checks of shapes and settings cost another 5 to
20 us. Both matter where a whole loss takes 30 us on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

# Compared by value, and holding no tensor.
_PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout}
)
_ORDINARY = frozenset({Tensor, nn.Parameter, type(None)})


def direct(*tensors: Tensor | None) -> bool:
    """Whether an op's Python implementation may be called in place of the registered op.

    False while torch.compile or torch.export trace, under a dispatch mode (fake tensors, selective
    checkpointing, a counter of operations) or a transform of torch.func, and for tensor subclasses:
    they must see the registered op. False also for a tensor with a pending negation, which only the
    dispatcher carries out.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for tensor in tensors:  # a generator costs 0.5 us more
        if type(tensor) not in _ORDINARY or (tensor is not None and tensor.is_neg()):
            return False
    return True


def seen(name: str, z: Any) -> tuple[torch.Size, torch.dtype, torch.device, torch.layout]:
    """The properties of z that a remembered check reads. Raises a TypeError if z is no tensor."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{name}: got {type(z).__name__}, takes a torch.Tensor")
    return z.shape, z.dtype, z.device, z.layout


def remembered(check: Callable[..., T]) -> Callable[..., T]:
    """Wrap `check` so that it keeps the results of its last 256 different calls.

    check: a function of its positional arguments only, which do not change: pass it the result of
    `seen` instead of a tensor. Equal arguments get equal results, so 1, 1.0 and True are the same
    setting. A call is not remembered if it raises, or if an argument is not a plain value (a
    symbolic size, a number of another library).
    """
    kept = lru_cache(maxsize=256)(check)

    def run(*arguments: Any) -> T:
        if torch.compiler.is_compiling():
            return check(*arguments)
        for argument in arguments:
            if type(argument) not in _PLAIN:
                return check(*arguments)
        try:
            return kept(*arguments)
        except TypeError:  # a symbolic size in a shape has no hash; or check's own error again
            return check(*arguments)

    return run
