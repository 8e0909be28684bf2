"""The EMA's state dictionaries: its own, and those of other EMAs and of bare models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vicreg_kernels.ema.matching import plain_name


def drop_shadow(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """After state_dict(): the shadow follows from the teacher."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}shadow.")]:
        del state_dict[key]


def translate(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before load_state_dict(): into keys "module.*", "shadow.*" and "step".

    timm's ModelEmaV3 has "module.*" alone, torch's AveragedModel "n_averaged" too; either around a
    DistributedDataParallel or compiled model has wrappers' names in between; a bare model's state
    has no prefix. The step is kept where the state has none.
    """
    teacher: nn.Module = module.module
    own = {plain_name(key): key for key in teacher.state_dict()}
    given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    for key in given:
        del state_dict[prefix + key]
    step = given.pop("step", None) if "step" not in own else None
    averaged = given.pop("n_averaged", None) if "n_averaged" not in own else None
    if step is None:
        step = module.step if averaged is None else averaged
    state_dict[f"{prefix}step"] = torch.as_tensor(step).detach().to(torch.int64)
    ours = all(f"module.{key}" in given for key in own.values())
    shadow: nn.Module | None = module.shadow
    # None: of another kind, which a module's get_extra_state may give.
    beside = {} if shadow is None else shadow.state_dict()
    dtypes = {k: getattr(z, "dtype", None) for k, z in beside.items()}
    rounded: dict[Any, torch.Tensor] = {}
    for key, value in given.items():
        if shadow is not None and key.startswith("shadow."):
            continue
        name = key.removeprefix("module.") if ours else _find(key, own)
        state_dict[f"{prefix}module.{name}" if name is not None else prefix + key] = value
        if name in dtypes and not isinstance(value, torch.Tensor):
            state_dict[f"{prefix}shadow.{name}"] = value
        elif name in dtypes:
            # one for each memory, so that assign=True keeps ties
            dtype = dtypes[name] or value.dtype
            place = value.data_ptr() if value.numel() else name, value.shape, dtype
            if place not in rounded:
                rounded[place] = value.detach().to(dtype, copy=True)
            state_dict[f"{prefix}shadow.{name}"] = rounded[place]


def _find(key: str, own: dict[str, str]) -> str | None:
    """The teacher's key that `key` means, without wrappers' names and outer "module."."""
    name = plain_name(key)
    while name not in own:
        if not name.startswith("module."):
            return None
        name = name.removeprefix("module.")
    return own[name]
