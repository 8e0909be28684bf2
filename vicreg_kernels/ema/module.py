"""EMA: a module that holds a teacher and follows a student."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_kernels.core import dispatch
from vicreg_kernels.ema import checks, matching, state
from vicreg_kernels.ema.api import ema_update_
from vicreg_kernels.ema.schedule import Schedule

BUFFERS = ("copy", "average", "ignore")
_PLAIN = {Tensor, nn.Parameter}
# For each root: the tensors to average, and those to copy.
Rows = Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]


class EMA(nn.Module):
    """A teacher whose weights are the exponential moving average of a student's.

        ema = EMA(model, 0.996, schedule="linear", total_steps=steps)
        ...
        optimizer.step()
        ema.update(model)
        with torch.no_grad():
            target = ema(images)

    Args:
        module: the student, which torch.compile, DistributedDataParallel or DataParallel may wrap.
            The teacher starts as its copy. With fully_shard, make the EMA first and shard
            `ema.module` (and `ema.shadow`) like the student; updates are then local to each rank.
        momentum, schedule, final_momentum, total_steps: with "constant" the momentum stays; with
            "linear" and "cosine" it moves to `final_momentum` in `total_steps` updates.
        dtype: the dtype of the teacher's floating-point tensors; None keeps each tensor's dtype.
        buffers: "copy" copies the student's buffers. "average" averages floating-point buffers and
            copies the others, and the vectors of spectral normalisation (timm). "ignore" leaves
            buffers unchanged (I-JEPA, torch's AveragedModel). Parameters, and buffers that are not
            ignored, must keep their shapes; another shape is an error before the first write.
        rounding, seed: "stochastic" lets a bfloat16 or float16 teacher follow small steps; see
            `ema_update_`. The EMA counts the step by itself.
        shadow_dtype: keep a second copy, `ema.shadow`, with parameters of this dtype, for the
            teacher's forward; it is written in the same pass.
        backend: as in `ema_update_`.

    The teacher needs no gradients and keeps the student's training or evaluation mode. The buffer
    `step` counts the updates. The state holds `step` and `module.*`, from which the shadow follows.
    The state of timm's ModelEmaV3, of torch's AveragedModel and of a plain model can be loaded too.

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
        """Run the teacher's forward, or the shadow's if there is one."""
        return (self.shadow if self.shadow is not None else self.module)(*args, **kwargs)

    def momentum(self) -> float | Tensor:
        """The momentum of the next update: a number if `step` is on the CPU, else a 0-d tensor on
        its device.
        """
        if self.schedule.kind == "constant":
            return self.schedule.start
        if self.step.device.type == "cpu" and not torch.compiler.is_compiling():
            return self.schedule.at(int(self.step))
        return self.schedule.at_tensor(self.step)

    def roots(self, student: nn.Module) -> list[nn.Module]:
        """The models whose tensors belong together: the teacher, the student and the shadow."""
        shadow = self.shadow
        return [self.module, student] if shadow is None else [self.module, student, shadow]

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float | Tensor | None = None) -> None:
        """Move the teacher one step towards `module`, the student. momentum: None: the schedule's.

        Raises ValueError if the student's tensors do not match the teacher's by name, shape or
        sharding; nothing has changed then.
        """
        student = matching.unwrap(module)
        momentum = self.momentum() if momentum is None else momentum
        step = self.step
        compiling = torch.compiler.is_compiling()
        match = None if compiling else self._match
        rows = match.rows() if match is not None and match.holds(self, student) else None
        if match is not None and rows is not None:
            try:
                self._average(match.local(rows), momentum, step)
            except (TypeError, ValueError):  # nothing is written; perhaps others match by now
                rows = None
        if rows is None:
            match = _Match(self, student)
            self._match = None if compiling else match
            rows = match.rows()
            assert rows is not None
            self._average(match.local(rows), momentum, step)
        teacher, sources, *shadow = (copied for _, copied in rows)
        for copies in (teacher, *shadow):
            for target, source in zip(copies, sources, strict=True):
                target.copy_(source)
        step.add_(1)

    def _average(
        self, lists: Sequence[Sequence[Tensor]], momentum: float | Tensor, step: Tensor
    ) -> None:
        ema_update_(
            lists[0],
            lists[1],
            momentum,
            shadows=(lists[2] if len(lists) > 2 else None) or None,
            rounding=self.rounding,
            seed=self.seed,
            step=step,
            backend=self.backend,
        )

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
    """Which tensors of the teacher, the student and the shadow belong together.

    Made by name; later calls find the tensors by their places. Where those no longer hold what the
    match was made for, `rows` is None, and it is made anew.
    """

    def __init__(self, ema: EMA, student: nn.Module) -> None:
        self.roots = ema.roots(student)
        # A traced graph has no use for the places.
        compiling = torch.compiler.is_compiling()
        self.trees = [] if compiling else [matching.Tree(root) for root in self.roots]
        named = [matching.named_tensors(root) for root in self.roots]
        self.averaged: list[str] = []
        self.copied: list[str] = []
        picks: list[tuple[list[int], list[int]]] = [([], []) for _ in self.trees]
        rows: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in named]
        self.ties: list[tuple[int, int]] = []  # places of a teacher's tensor's two names
        self.by_dtype: list[int] = []  # which of the copied ones would be averaged if they floated
        for k in (0, 1) if ema.buffer_rule != "ignore" else (0,):
            kind = ("parameters", "buffers")[k]
            for other in named[1:]:
                matching.check_names(kind, named[0][k], other[k])
            ties = matching.ties(named[0][k])
            averages = k == 0 or ema.buffer_rule == "average"
            directions = matching.directions(ema.module) if k == 1 and averages else ()
            for name, z in named[0][k].items():
                if name in ties:
                    if self.trees:
                        places = self.trees[0].places[k]
                        self.ties.append((places[ties[name]], places[name]))
                    continue
                copies = not (averages and _floats(z)) or name in directions
                if copies and averages and name not in directions:
                    self.by_dtype.append(len(self.copied))
                (self.copied if copies else self.averaged).append(name)
                for pick, tree in zip(picks, self.trees, strict=True):
                    pick[copies].append(tree.places[k][name])
                for each, tensors in zip(rows, named, strict=True):
                    each[copies].append(tensors[k][name])
        self.fixed: Rows | None = rows if compiling else None
        self.plain = not any([z.is_complex() for z in rows[0][0] + rows[1][0]])
        self.picks = [tuple(map(_picker, pair)) for pair in picks]

    def holds(self, ema: EMA, student: nn.Module) -> bool:
        """Whether these are still the roots, and their parts and names the same."""
        return ema.roots(student) == self.roots and all([t.unchanged() for t in self.trees])

    def rows(self) -> Rows | None:
        """For each root: the tensors to average, and those to copy."""
        if self.fixed is not None:
            return self.fixed
        flat = [tree.tensors() for tree in self.trees]
        for tree, values in zip(self.trees, flat, strict=True):
            if any([values[place] is not None for place in tree.absent]):
                return None
        rows = [(a(values), c(values)) for (a, c), values in zip(self.picks, flat, strict=True)]
        teacher, copied = flat[0], rows[0][1]
        for one, other in self.ties:
            a, b = teacher[one], teacher[other]
            if a is not b and (a is None or b is None or matching.place(a) != matching.place(b)):
                return None
        # The op looks at the shapes of what it averages.
        shapes = [[z.shape for z in tensors] for _, tensors in rows]
        if shapes.count(shapes[0]) < len(shapes):
            return None
        return None if any([_floats(copied[i]) for i in self.by_dtype]) else rows

    def local(self, rows: Rows) -> list[Sequence[Tensor]]:
        """The tensors to average, as the op takes them: shards of this rank, reals of complexes."""
        lists = [averaged for averaged, _ in rows]
        if self.plain and all([_PLAIN.issuperset(map(type, tensors)) for tensors in lists]):
            return lists
        teacher, student, *shadow = lists
        pairs = list(map(matching.local, self.averaged, teacher, student))
        local = [[t for t, _ in pairs], [s for _, s in pairs]]
        for tensors in shadow:
            both = map(matching.local, self.averaged, tensors, student)
            local.append([t for t, _ in both])
        return [*local]


def _floats(z: Tensor) -> bool:
    return z.is_floating_point() or z.is_complex()


def _picker(places: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: [values[place] for place in places]
