"""EMA: a module that holds a teacher and follows a student."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_kernels import dispatch
from vicreg_kernels.ema import checks, matching, state
from vicreg_kernels.ema.op import ema_update_
from vicreg_kernels.ema.schedule import Schedule

BUFFERS = ("copy", "average", "ignore")


class EMA(nn.Module):
    """A teacher whose weights are the exponential moving average of a student's.

        ema = EMA(model, 0.996, schedule="linear", total_steps=steps)
        ...
        optimizer.step()
        ema.update(model)
        with torch.no_grad():
            target = ema(images)

    Args:
        module: the student; also as torch.compile, DistributedDataParallel or DataParallel wrap it.
            The teacher starts as its copy. With fully_shard, make the EMA first and shard
            `ema.module` (and `ema.shadow`) like the student: updates are then local to each rank.
        momentum, schedule, final_momentum, total_steps: "constant" keeps `momentum`; "linear" and
            "cosine" go from it to `final_momentum` in `total_steps` updates (`Schedule`).
        dtype: of the teacher's floating tensors; None keeps each one's own.
        buffers: "copy" takes the student's buffers over, "average" averages the floating ones and
            copies the others (timm), "ignore" leaves all (I-JEPA, torch's AveragedModel).
        rounding, seed: "stochastic" keeps a bfloat16 or float16 teacher from standing still; see
            `ema_update_`. The step number is the EMA's own.
        shadow_dtype: keep a second copy, `ema.shadow`, with parameters of this dtype, for the
            teacher's forward; it is written in the same pass.
        backend: as in `ema_update_`.

    The teacher needs no gradients and keeps the student's training or evaluation mode. `step`, a
    buffer, counts the updates; it and `module.*` are the state; the shadow follows from them. State
    of timm's ModelEmaV3, of torch's AveragedModel and of a bare model loads too.

    Raises:
        ValueError, TypeError: a setting is not one of the above; the message names it.
    """

    step: Tensor
    shadow: nn.Module | None

    def __init__(
        self,
        module: nn.Module,
        momentum: float = 0.996,
        *,
        schedule: str = "constant",
        final_momentum: float = 1.0,
        total_steps: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        buffers: str = "copy",
        rounding: str = "nearest",
        seed: int = 0,
        shadow_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: got {type(module).__name__}, takes a torch.nn.Module")
        self.schedule = Schedule(schedule, momentum, final_momentum, total_steps)
        if buffers not in BUFFERS:
            raise ValueError(f"buffers: got {buffers!r}, takes one of {BUFFERS}")
        for name, value in (("dtype", dtype), ("shadow_dtype", shadow_dtype)):
            if value is not None and value not in checks.DTYPES:
                raise TypeError(f"{name}: got {value}, takes None or one of {checks.DTYPES}")
        checks.check_rounding(rounding, seed)
        dispatch.check_backend(backend)
        student = matching.unwrap(module)
        if matching.is_sharded(student):
            raise ValueError(
                "module: got one that fully_shard has sharded, which cannot be copied; make the EMA"
                " before, then apply fully_shard to ema.module as well"
            )
        self.buffer_rule, self.rounding, self.seed, self.backend = buffers, rounding, seed, backend
        self.module = _teacher(student, dtype, also_buffers=True)
        self.shadow = None
        if shadow_dtype is not None:
            self.shadow = _teacher(student, shadow_dtype, also_buffers=False)
        first = next(iter(self.module.parameters()), torch.empty(0))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=first.device))
        self.register_state_dict_post_hook(state.drop_shadow)
        self.register_load_state_dict_pre_hook(state.translate)
        self._match: _Match | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's forward: the shadow's, if there is one."""
        return (self.shadow if self.shadow is not None else self.module)(*args, **kwargs)

    def momentum(self) -> float | Tensor:
        """Of the next update: a number where `step` is on the CPU, else a 0-d tensor beside it."""
        if self.schedule.kind == "constant":
            return self.schedule.start
        if self.step.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.schedule.at(int(self.step))
        return self.schedule.at_tensor(self.step)

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float | Tensor | None = None) -> None:
        """One step towards `module`, the student. momentum: None takes the schedule's.

        Raises ValueError where the student's tensors do not match the teacher's by name, shape or
        sharding; then nothing has been changed.
        """
        student = matching.unwrap(module)
        if torch.compiler.is_compiling():
            pairs = _Match(self, student)
        else:
            if self._match is None or not self._match.holds(self, student):
                self._match = _Match(self, student)
            pairs = self._match
        targets, onlines, shadows, copies = pairs.tensors()
        ema_update_(
            targets,
            onlines,
            self.momentum() if momentum is None else momentum,
            shadows=shadows or None,
            rounding=self.rounding,
            seed=self.seed,
            step=self.step,
            backend=self.backend,
        )
        for target, source in copies:
            target.copy_(source)
        self.step += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_match": None}  # it refers to the student

    def extra_repr(self) -> str:
        s = self.schedule
        text = f"momentum={s.start}, schedule={s.kind!r}"
        if s.kind != "constant":
            text += f", final_momentum={s.final}, total_steps={s.total}"
        return f"{text}, buffers={self.buffer_rule!r}, rounding={self.rounding!r}"


def _teacher(student: nn.Module, dtype: torch.dtype | None, also_buffers: bool) -> nn.Module:
    """A copy that needs no gradients; ties between its tensors stay."""
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for z in teacher.parameters():
            z.requires_grad_(False)
            if dtype is not None and z.is_floating_point():
                z.data = z.data.to(dtype)
        for z in teacher.buffers():
            if also_buffers and dtype is not None and z.is_floating_point():
                z.data = z.data.to(dtype)
    return teacher


class _Match:
    """Which tensors of the teacher, the student and the shadow belong together."""

    def __init__(self, ema: EMA, student: nn.Module) -> None:
        roots = [ema.module, student] + ([ema.shadow] if ema.shadow is not None else [])
        self.roots = [root for root in roots if root is not None]
        self.trees: list[matching.Tree] = []
        named = [matching.named_tensors(root) for root in self.roots]
        kinds = ("parameters", "buffers") if ema.buffer_rule != "ignore" else ("parameters",)
        averaged: list[tuple[str, list[Tensor]]] = []  # name, the tensor of each root
        copied: list[tuple[str, list[Tensor]]] = []
        for k, kind in enumerate(kinds):
            for other in named[1:]:
                matching.check_names(kind, named[0][k], other[k])
            for name, z in matching.untied(named[0][k]).items():
                averages = z.is_floating_point() or z.is_complex()
                averages = averages and (k == 0 or ema.buffer_rule == "average")
                group = averaged if averages else copied
                group.append((name, [tensors[k][name] for tensors in named]))
        self.averaged = [name for name, _ in averaged]
        self.fixed: list[list[Tensor]] | None = None
        if torch.compiler.is_compiling():  # a traced graph has no use for the dictionaries
            self.fixed = [z for _, z in averaged + copied]
            return
        self.trees = [matching.Tree.of(root) for root in self.roots]
        places = [tree.places() for tree in self.trees]
        self.slots = [
            [place[id(z)] for place, z in zip(places, tensors, strict=True)]
            for _, tensors in averaged + copied
        ]

    def holds(self, ema: EMA, student: nn.Module) -> bool:
        """Whether these are still the roots, and their parts the same."""
        roots = [ema.module, student] + ([ema.shadow] if ema.shadow is not None else [])
        return roots == self.roots and [matching.Tree.of(root) for root in roots] == self.trees

    def tensors(
        self,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Targets, online tensors and shadows of the average; (target, source) of copies."""
        rows: Sequence[list[Tensor]]
        if self.fixed is not None:
            rows = self.fixed
        else:
            rows = [[kept[key] for kept, key in slots] for slots in self.slots]
        count = len(self.averaged)
        targets, onlines, shadows = [], [], []
        for name, row in zip(self.averaged, rows, strict=False):
            target, online = matching.local(name, row[0], row[1])
            targets.append(target)
            onlines.append(online)
            if len(row) > 2:
                shadows.append(matching.local(name, row[2], row[1])[0])
        copies = [
            (target, row[1])
            for row in rows[count:]
            for target in (row[0], *row[2:])
            if target is not None
        ]
        return targets, onlines, shadows, copies
