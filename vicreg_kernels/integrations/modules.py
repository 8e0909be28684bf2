"""Modules of other people's models with methods of this library's, and their own again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_kernels.attention.api import takes_head_dim
from vicreg_kernels.core import library
from vicreg_kernels.core.dispatch import logger
from vicreg_kernels.integrations import masks

Methods = Mapping[str, Callable[..., Any]]
_BACKEND = "_vicreg_kernels_backend"  # of the twin that _differs makes


def put(module: nn.Module, methods: Methods) -> None:
    """Each method(module, ...) in place of the module's own of that name. A copy of the module,
    deep or pickled, has methods that are bound to the copy.
    """
    for name, method in methods.items():
        setattr(module, name, partial(method, module))


def has(module: nn.Module, methods: Methods) -> bool:
    """Whether `put` has put these."""
    found = (module.__dict__.get(name) for name in methods)
    return all(
        isinstance(each, partial) and each.func is method
        for each, method in zip(found, methods.values(), strict=True)
    )


def take_back(module: nn.Module, methods: Methods) -> None:
    for name in methods:
        module.__dict__.pop(name, None)


@dataclass(frozen=True)
class Kind:
    """How the attention modules of one class are fused.

    forward: in place of the class's own: forward(module, ...).
    cannot: what forward does not compute with a module's settings; None: nothing.
    calls: arguments with which both forwards are compared, given the module and a function that
        draws a tensor of a shape.
    """

    forward: Callable[..., Any]
    cannot: Callable[[Any], str | None]
    calls: Callable[[Any, Callable[..., Tensor]], list[dict[str, Any]]]

    @property
    def methods(self) -> Methods:
        return {"forward": self.forward}


FindKind = Callable[[nn.Module], Kind | None]


@dataclass(frozen=True)
class Report:
    """Which attention modules of a model run on `masked_attention`.

    Attributes:
        fused: the names of those that do.
        left: the names of the others, and why each is left as it was.
    """

    fused: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        count = len(self.fused) + len(self.left)
        lines = [f"{len(self.fused)} of {count} attention modules are fused"]
        for reason in dict.fromkeys(self.left.values()):
            names = ", ".join(name for name, why in self.left.items() if why == reason)
            lines.append(f"  left {names}: {reason}")
        return "\n".join(lines)


def report(model: nn.Module, find: FindKind) -> Report:
    fused, left = [], {}
    for name, module, kind, reason in _survey(model, find):
        if reason is None and kind is not None and has(module, kind.methods):
            fused.append(name)
        else:
            left[name] = reason or "not fused yet"
    return Report(tuple(fused), left)


def fuse(model: nn.Module, find: FindKind) -> nn.Module:
    """Gives every module that `find` knows its kind's forward; says in the log which others attend.

    Raises: ValueError where there is none to give it to.
    """
    fused, left = [], {}
    for name, module, kind, reason in list(_survey(model, find)):
        if reason is not None or kind is None:
            left[name] = reason or "not fused"
            continue
        fused.append(name)
        if not has(module, kind.methods):
            put(module, kind.methods)
    found = Report(tuple(fused), left)
    if not fused:
        raise ValueError(f"model: got {type(model).__name__}, in which {found}")
    if left:
        logger.warning("%s: %s", type(model).__name__, found)
    return model


def unfuse(model: nn.Module, find: FindKind) -> nn.Module:
    """Takes `fuse` back. Raises: ValueError where no module is fused."""
    kinds = ((module, find(module)) for module in model.modules())
    fused = [(module, kind) for module, kind in kinds if kind and has(module, kind.methods)]
    if not fused:
        raise ValueError(f"model: got {type(model).__name__} that is not fused, takes what is")
    for module, kind in fused:
        take_back(module, kind.methods)
    return model


def _survey(
    model: nn.Module, find: FindKind
) -> Iterator[tuple[str, nn.Module, Kind | None, str | None]]:
    """Every module that attends, and why it cannot be fused (None: it can, or is)."""
    compared: dict[tuple[Any, ...], str | None] = {}
    for name, module in model.named_modules():
        kind = find(module)
        own = type(module).__name__
        if kind is None:
            if hasattr(module, "fused_attn") or ("Attention" in own and not own.endswith("Block")):
                yield name, module, None, f"{own} is not among the classes that are fused"
        elif has(module, kind.methods):
            yield name, module, kind, None
        elif "forward" in module.__dict__:
            yield name, module, kind, "its forward has been replaced already"
        else:
            yield name, module, kind, _reason(module, kind, compared)


def _reason(
    module: nn.Module, kind: Kind, compared: dict[tuple[Any, ...], str | None]
) -> str | None:
    """Why a module cannot be fused, with what `compared` holds of others like it. One that cannot
    be looked at, such as a class of the same name without the attributes, is left.
    """
    try:
        if reason := kind.cannot(module):
            return reason
        key = (type(module), kind.forward, _settings(module))
        if key not in compared:
            compared[key] = _differs(module, kind)
        return compared[key]
    except Exception as error:  # whatever another class of that name raises
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"{type(module).__name__} cannot be compared with the class that is known: {what}"


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What one module of a class may have otherwise than another, in itself and in its parts, but
    for the values of its parameters.
    """
    found: list[Any] = []
    for place, part in module.named_modules():
        found.append((place, type(part)))
        found += [(name, _described(z, False)) for name, z in part._parameters.items()]
        found += [(name, _described(z, True)) for name, z in part._buffers.items()]
        public = (item for item in vars(part).items() if not item[0].startswith("_"))
        found += [(name, _described(value, True)) for name, value in public]
    return tuple(found)


def _described(value: Any, with_values: bool) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    data = None
    if with_values and not value.is_meta:
        data = bytes(value.detach().cpu().reshape(-1).view(torch.uint8).tolist())
    return tuple(value.shape), value.dtype, data


def _twin(module: nn.Module, draw: Callable[..., Tensor]) -> Any:
    """A copy in float64 on the CPU without hooks, whose weights are drawn large enough for
    attention to look somewhere.
    """
    twin = copy.deepcopy(module)
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
        for name, z in part.named_parameters(recurse=False):
            drawn = draw(*z.shape) / math.sqrt(z.shape[-1] if z.dim() > 1 else 1)
            setattr(part, name, nn.Parameter(drawn, requires_grad=False))
        for name, z in part.named_buffers(recurse=False):
            value = torch.zeros_like(z, device="cpu") if z.is_meta else z.cpu()
            setattr(part, name, value.double() if z.is_floating_point() else value)
    twin.__dict__[_BACKEND] = "reference"
    return twin


def _differs(module: nn.Module, kind: Kind) -> str | None:
    """Whether the class's own forward gives anything else, on a few random tokens: a class may be
    another of the same name, or another version of it.

    In the module's mode, and in the other one where the fused forward takes it: what drops in
    training alone would be lost there. Both forwards drop the same, from the same seed. Of a tuple
    the first entry is compared, the output.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    cpu = torch.device("cpu")
    with cpu, torch.random.fork_rng(devices=[]), torch.no_grad(), library.no_autocast(cpu):
        twin = _twin(module, draw)
        calls = kind.calls(twin, draw)
        reason = _differs_now(twin, kind, calls)
        twin.train(not module.training)
        if reason is None and kind.cannot(twin) is None:
            reason = _differs_now(twin, kind, calls)
        return reason


def _differs_now(twin: Any, kind: Kind, calls: list[dict[str, Any]]) -> str | None:
    """The same in the mode that the twin is in."""
    own = type(twin).__name__
    for call in calls:
        results = []
        for forward in (type(twin).forward, kind.forward):
            torch.random.default_generator.manual_seed(0)  # of the CPU alone
            try:
                results.append(forward(twin, **call))
            except Exception as error:  # whatever another class of that name raises
                return f"{own} raised {type(error).__name__} on a few tokens: {error}"
        if all(isinstance(result, tuple) for result in results):
            results = [result[0] for result in results]
        expected, found = results
        if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
            return f"{own} returns something else than the class of that name that is known"
        if expected.shape != found.shape or not torch.allclose(expected, found, 1e-4, 1e-4):
            return f"{own} computes something else than the class of that name that is known"
    return None


def cannot_take(head_dim: int) -> str | None:
    if takes_head_dim(head_dim):
        return None
    return f"its head dim is {head_dim}, attention takes a multiple of 8 from 16 to 128"


def cannot_drop(module: Any) -> str | None:
    if module.training and module.attn_drop.p:
        return f"attn_drop is {module.attn_drop.p} in training, attention takes 0"
    return None


def heads(x: Tensor, count: int) -> Tensor:
    """[B, T, count d] -> [B, count, T, d]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Any, **settings: Any) -> Tensor:
    """`masks.attend` with its heads merged, [B, T, H d].

    Raises: ValueError where there is both a mask and a causal order.
    """
    if settings.get("causal") and mask[0] is not None:
        raise ValueError("is_causal: got True with an attn_mask, takes one of the two")
    backend = module.__dict__.get(_BACKEND)
    out = masks.attend(q, k, v, *mask, backend=backend, **settings)
    return out.transpose(1, 2).flatten(2)
