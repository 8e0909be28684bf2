"""What every op's benchmark file gives the runner: its cases.

`bench/<op>.py` holds CASES, a dict of `Case` by name, most important first.
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

    steps: contender -> one whole step (forward and backward, unless the case's name says
    otherwise), "ours" first. compiled: contenders whose first call compiles. skipped: contender ->
    why it cannot take part here. least_bytes, least_operations: what any implementation must move
    and do, the floor that is reported.
    """

    steps: dict[str, Step]
    backend: str
    least_bytes: int
    least_operations: int
    compiled: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """build(device, dtype, backend of ours or None) -> Plan.

    targets: device type -> contender -> the least ratio of its time to ours. dtypes: device type ->
    the dtypes that are measured there; a device that is absent is not measured.
    """

    name: str
    build: Callable[[torch.device, torch.dtype, str | None], Plan]
    targets: dict[str, dict[str, float]]
    dtypes: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("float32",), "cuda": ("bfloat16",)}
    )
