"""What an op gives the benchmarks: one file, `bench/<op>.py`, and its name in `bench.OPS`.

The file is imported only where the op is measured, and holds

    TITLE       what a step is and how cases are named, the heading of the tables and the chart:
                "VICReg loss, forward and backward, by batch x dimensions"
    CONTENDERS  dict: every contender but "ours" -> what it is, in about four words (the chart's
                legend), in the order of the tables' columns. Headings break at the underscores.
                The runner adds "ours_cuda" and "ours_triton" by itself.
    CASES       dict: name -> Case, most important first: a run that is cut short has measured what
                it was run for. At least one is `quick`.
    exercise    optional: exercise(backend, device) -> int, the count of results that are not
                finite. It calls every kernel of the op once, forward and backward, in each dtype,
                on small shapes that no tile divides: what compute-sanitizer watches. It names the
                backend in every call, and runs on the CPU too. The kernels are known by name: CUDA
                ones by the namespace called after the op, Triton ones by an ending in _kernel.

The rest is the runner's: warm-up, interleaving, memory, CUDA graphs, ceilings, records, tables,
chart. Baselines that need room of their own go to `bench/<op>_<what>.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Step = Callable[[], Any]


@dataclass(frozen=True)
class Plan:
    """The contenders of one case on one device, all doing the same work on the same inputs.

    steps: contender -> one whole step (forward and backward, unless TITLE or the case's name says
    otherwise), "ours" first, those of much time or memory last. A step returns its results, can be
    called any number of times, and leaves no `.grad` behind (`bench.measure.gradients` makes one of
    a loss). All of them are built; those that are not wanted are never called.
    backend: which backend of ours runs, as `dispatch.choose` gives it.
    least_bytes, least_operations: what any implementation must move and do in a step (a multiply
    and an add are two), the floor that is reported; 0 where it does not count.
    compiled: contenders that torch.compile builds in their first call (`bench.measure.compiled`).
    peers: other packages' own code, perhaps slow: not captured as a CUDA graph. Both are measured
    one by one, after all others (bench/groups.py).
    elsewhere: steps run in other processes, whose memory is not counted.
    host: what counts is the time until a step returns, not until the device is done.
    shares: a step of several ops, of which the record says what share of the time each takes.
    skipped: contender -> why it cannot take part in this case, here (not installed, no such
    device, no memory for it); it has no step then.
    """

    steps: dict[str, Step]
    backend: str
    least_bytes: int
    least_operations: int
    compiled: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    peers: tuple[str, ...] = ()
    elsewhere: bool = False
    host: bool = False
    shares: bool = False


@dataclass(frozen=True)
class Case:
    """build(device, dtype, backend of ours or None) -> Plan; torch's seed is set before it.

    targets: device type -> contender -> the least ratio of its time to ours. dtypes: device type ->
    the dtypes that are measured there and that the targets hold for; a device that is absent is
    measured only when the case is named. quick: part of the run of a minute on the CPU. floor: on
    cuda, the most that ours may take as a multiple of its floor. most_ms: the most milliseconds
    that ours may take, on any device. each_backend: whether ours is measured on each backend of a
    GPU, which a step of several ops has no single one of.
    """

    name: str
    build: Callable[[torch.device, torch.dtype, str | None], Plan]
    targets: dict[str, dict[str, float]]
    dtypes: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("float32",), "cuda": ("bfloat16",)}
    )
    quick: bool = False
    floor: float | None = None
    most_ms: float | None = None
    each_backend: bool = True
