"""Schema, fake and backends of the EMA op; api.py has the public function.

One op takes whole lists, so that a backend sees all the work at once. It mutates `targets` and
`shadows` and returns nothing; there is no gradient. What cannot be seen while a graph is traced,
the value of a momentum on the CPU and where memory lies, is checked when the op runs, before it
writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels.core import loader, schema
from vicreg_kernels.core.library import NAMESPACES
from vicreg_kernels.ema import checks, reference
from vicreg_kernels.ema.contract import Kernels, Settings

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] onlines, Tensor(b!)[] shadows, str backend,"
    f" {schema.arguments(Settings, step='SymInt')}) -> ()"
)


@torch.library.impl(_LIBRARY, "ema_update_", "CompositeExplicitAutograd")
def _update(
    targets: list[Tensor],
    onlines: list[Tensor],
    shadows: list[Tensor],
    backend: str,
    *arguments: Any,
) -> None:
    lists, settings = (targets, onlines, shadows), Settings(*arguments)
    if not update(False, *lists, backend, settings):
        checks.check_overlap(*lists)
        update(True, *lists, backend, settings)


def update(
    checked: bool,
    targets: list[Tensor],
    onlines: list[Tensor],
    shadows: list[Tensor],
    backend: str,
    settings: Settings,
) -> bool:
    """Run the update. checked: whether the lists have been checked. If not, the kernel checks them
    quickly, and returns False and writes nothing if it cannot tell that they are right.
    """
    momentum_tensor, step_tensor = settings.momentum_tensor, settings.step_tensor
    if momentum_tensor is not None and momentum_tensor.device.type == "cpu":
        momentum = momentum_tensor.item()
        settings = settings._replace(momentum=momentum, momentum_tensor=None)
        checks.check_momentum("momentum", momentum)
    if step_tensor is not None and step_tensor.device.type == "cpu":
        step = int(step_tensor.item())
        settings = settings._replace(step=step, step_tensor=None)
        checks.check_step(step)
    lists = targets, onlines, shadows
    if backend in NAMESPACES:
        kernels = loader.load("ema", Kernels, backend)
        if not kernels.update_(*lists, *settings, checked):
            return False
    elif not checked:
        return False
    elif backend == "reference":
        update_by_reference: Callable[..., None] = reference.update_
        update_by_reference(*lists, *settings)
    else:
        loader.load("ema", Kernels, backend).update_(*lists, *settings)
    torch.autograd.graph.increment_version([*targets, *shadows] if shadows else targets)
    return True


@torch.library.register_fake("vicreg_kernels::ema_update_")
def _update_fake(*args: object) -> None:
    return None
