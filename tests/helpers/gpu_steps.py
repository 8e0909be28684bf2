"""What the GPU tests of several ops ask of a step: captured in a graph, and without a wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def captured(step: Callable[[], R]) -> tuple[torch.cuda.CUDAGraph, R]:
    """A graph of step() after three runs that load and compile kernels, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def check_no_wait(step: Callable[[], object]) -> None:
    """The host does not wait for the device in step()."""
    step()  # loads and compiles kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_replays(
    gradients: Callable[[Tensor, Tensor], Sequence[Tensor]],
    views: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    """A graph replayed on NaN leaves NaN in every buffer of its pool; whatever a later replay does
    not write anew shows.
    """
    x, y = views()
    graph, results = captured(lambda: gradients(x, y))
    for _ in range(2):
        with torch.no_grad():
            x.fill_(torch.nan)
            y.fill_(torch.nan)
        graph.replay()
        assert all(result.isnan().all() for result in results)
        fresh = views()
        with torch.no_grad():
            x.copy_(fresh[0])
            y.copy_(fresh[1])
        graph.replay()
        replayed = [result.clone() for result in results]
        graph.replay()
        for again, once, wanted in zip(results, replayed, gradients(*fresh), strict=True):
            assert torch.equal(again, once)
            # a captured vendor product may take another algorithm than an eager one
            assert once.isfinite().all()
            error = (once.double() - wanted.double()).norm() / wanted.double().norm()
            assert error <= torch.finfo(once.dtype).eps * max(x.shape) ** 0.5
