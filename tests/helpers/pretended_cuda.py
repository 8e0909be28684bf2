"""As much of torch.cuda as the library and its tests call, for the GPU of pretended_gpu.py."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch

CUDA = torch.device("cuda", 0)


class _Stream:
    cuda_stream = 0
    device = CUDA

    def __init__(self, *args: Any, **keywords: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event


class _Graph:
    capturing = False

    def replay(self) -> None: ...
    def reset(self) -> None: ...


@contextlib.contextmanager
def _capture(graph: Any, *args: Any, **keywords: Any) -> Iterator[None]:
    _Graph.capturing = True
    try:
        yield
    finally:
        _Graph.capturing = False


@contextlib.contextmanager
def _context(*args: Any, **keywords: Any) -> Iterator[None]:
    yield


H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 << 30, warp_size=32, regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20,
)  # fmt: skip


def nothing(*args: Any, **keywords: Any) -> None: ...


STUBS: dict[str, Any] = {
    "_lazy_init": nothing,
    "init": nothing,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *a, **k: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": nothing,
    "get_device_properties": lambda device=None: H100,
    "get_device_name": lambda device=None: H100.name,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (79 << 30, 80 << 30),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": nothing,
    "empty_cache": nothing,
    "synchronize": nothing,
    "set_sync_debug_mode": nothing,
    "get_sync_debug_mode": lambda: 0,
    "manual_seed": nothing,
    "manual_seed_all": nothing,
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": nothing,
    "get_rng_state_all": lambda: [],
    "_sleep": nothing,
    "Stream": _Stream,
    "stream": _context,
    "device": _context,
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "CUDAGraph": _Graph,
    "graph": _capture,
    "is_current_stream_capturing": lambda: _Graph.capturing,
}
