"""A short soak of every op and module, and proof that a soak sees what grows (`make soak` makes
10,000 calls of each).
"""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch
from torch import nn

import vicreg_kernels.core.calls
from tests.fuzz import campaign, soak

CALLS = {"vicregl_loss": 60, "vicregl_terms": 60}


@pytest.fixture(scope="module", autouse=True)
def thawed():
    """What a soak has frozen, for the tests of other files."""
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", soak.steps())
def test_two_hundred_calls_leave_nothing_behind(name) -> None:
    with campaign.one_thread():
        sizes = soak.soak(name, soak.steps()[name], CALLS.get(name, 200))
    assert not soak.growth(sizes)


@pytest.fixture
def leak():
    """What a leaking step holds on to; let go of afterwards."""
    held: list = []
    yield held
    for one in held:
        if isinstance(one, int):
            os.close(one)
        elif isinstance(one, threading.Event):
            one.set()


def _thread(held: list) -> None:
    held.append(threading.Event())
    threading.Thread(target=held[-1].wait, daemon=True).start()


# In 100 calls.
LEAKS = {
    "memory": lambda held: held.append(torch.ones(1_000_000)),
    "objects": lambda held: held.append([nn.Identity() for _ in range(10)]),
    "threads": _thread,
    "descriptors": lambda held: held.append(os.open(os.devnull, os.O_RDONLY)),
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_leak_is_named(what, leak) -> None:
    sizes = soak.soak("a leak", lambda r: LEAKS[what](leak), 100)
    assert any(word.startswith(what) for word in soak.growth(sizes))


def test_a_leak_into_freed_memory_is_named(leak) -> None:
    """What was freed before stays in malloc's heap, and a leak that fills it maps no new page."""
    torch.ones(8_000_000)  # 32 MB, mapped and freed: tensors below that now come from the heap
    freed = [torch.ones(1_000_000) for _ in range(120)]
    leak.append(freed.pop())  # the heap's end, so that it cannot shrink
    freed.clear()
    sizes = soak.soak("a leak", lambda r: LEAKS["memory"](leak), 100)
    assert any(word.startswith("memory") for word in soak.growth(sizes))


def test_a_cache_that_grows_is_named(monkeypatch) -> None:
    cache: dict[int, int] = {}
    monkeypatch.setattr(vicreg_kernels.core.calls, "_cache", cache, raising=False)
    sizes = soak.soak("a cache", lambda r: cache.setdefault(len(cache), 0), 100)
    assert soak.growth(sizes) == ["vicreg_kernels.core.calls._cache 40 -> 100 entries"]


def test_caches_inside_functions_are_seen() -> None:
    """What `calls.remembered` keeps is an lru_cache that a function closes over."""
    inside = list(soak._inside(vicreg_kernels.core.calls.remembered(len), set()))
    assert any(isinstance(one, soak._CACHE) for one in inside)
