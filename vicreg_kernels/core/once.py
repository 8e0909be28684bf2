"""Gradients that differentiate once: a second derivative, of reverse or forward mode, is an error,
not a silent 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from vicreg_kernels.core import dispatch

T = TypeVar("T")


class _Once(torch.autograd.Function):
    """A gradient's calculation under create_graph=True.

    torch's once_differentiable does not do: autograd.grad can walk past its error node.
    """

    @staticmethod
    def forward(ctx: Any, what: str, gradient: Callable[..., Any], *args: Any) -> Any:
        ctx.what = what
        return gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"the fused {ctx.what} differentiates once; backend='reference' to any order"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            f"the fused {ctx.what} has no forward-mode derivative; backend='reference' has one"
        )


def once(what: str, gradient: Callable[..., T], *args: Any) -> T:
    """Call gradient(*args) inside a backward. Differentiating its result, in reverse or forward
    mode, raises a RuntimeError that begins with "the fused `what`".
    """
    if torch.is_grad_enabled() or dispatch.carries_tangents():
        return _Once.apply(what, gradient, *args)
    return gradient(*args)
