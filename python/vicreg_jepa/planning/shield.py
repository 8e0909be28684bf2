"""The shield between a planner and a world: no action passes that may break a constraint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.guardrails import Constraint, against
from vicreg_jepa.planning.reach import Box, around, pushes, reached
from vicreg_jepa.worlds.world import MOST_NOISE, World

# Clearance, in pixels, that planned actions leave: more than the rounding of float32 in the
# distances. The fallbacks lower no clearance, so they are only asked for 0.
ROUNDING = 1e-3
SHARES = (1.0, 0.5, 0.25)  # of the planned action, tried in this order
AXES = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))  # the whole action, or one of its components


class NoSafeAction(RuntimeError):
    """No action is safe for every outcome. environments: their numbers. Nothing was executed."""

    def __init__(self, environments: list[int], why: str) -> None:
        super().__init__(f"environments {environments[:8]}: {why}")
        self.environments = environments


@dataclass(frozen=True)
class Shield:
    """Executes an action only if the next state satisfies all constraints for every outcome.

    Assumed, and nothing else:

    1. A step is World.step: a displacement of 2 * action + u, |u| <= `noise` along each axis, which
       walls only shorten.
    2. Observed positions are within `error` pixels of the true ones along each axis, and `delay`
       steps old; before that many steps, they are of the first state.
    3. The actions that the shield returns are the ones that are executed.
    4. The layout is the true one. With `walls=False` it is not used, and nothing is assumed about
       walls but that they shorten displacements.

    Promised: no executed state violates a constraint. The shield keeps a box that holds the true
    position: what the last box and the executed action can reach, cut with what the observation
    allows. It tries the planned action, projected to [-1, 1]; half and a quarter of it; one of its
    components; then the fallbacks: to lean, which outweighs the noise away from a zone (without
    noise, that is to stop), to retreat at full speed, and the action 0. It executes the first one
    for which the next box is safe, and a fallback is safe from there. If there is none, or the
    first state is not known to be safe, it raises NoSafeAction, and nothing is executed.

    With one Zone it never refuses after the first step. Let an action point away from the centre of
    the zone, and outweigh the noise, along each axis on which the box does not lie across the
    centre. Then, whatever walls do, no position of the box comes nearer along these axes; another
    axis adds nothing to the distance that is kept. So the next box is as safe, and every later box
    is inside the one that was predicted. A Speed of sqrt(8) * noise or more allows this action.
    With several zones, or a Distance or Clearance, the promise holds, but the shield may refuse.

    With an `error` from conformal.error the promise holds with that probability for an episode, if
    the held-out episodes and those of the planner are exchangeable.
    """

    constraints: tuple[Constraint, ...]
    noise: float = 0.0
    error: float = 0.0
    delay: int = 0
    walls: bool = True

    def __post_init__(self) -> None:
        if not self.constraints or not all(isinstance(c, Constraint) for c in self.constraints):
            raise ValueError(
                f"constraints: got {self.constraints!r}, takes a tuple of one Constraint or more"
            )
        checks.number("noise", self.noise, most=MOST_NOISE)
        checks.number("error", self.error)
        checks.whole("delay", self.delay, 0)

    def begin(self, world: World, position: Tensor, layout: Tensor) -> Guard:
        """Guard N episodes from the first observed positions [N, 2]. Raises NoSafeAction if a first
        position is not known to be safe, ValueError if the world has more noise.
        """
        if world.noise > self.noise:
            raise ValueError(
                f"noise: got {self.noise} in the shield, takes the world's {world.noise} or more"
            )
        return Guard(self, world, position, layout if self.walls else None)


class _Rows:
    """The constraints and the layout of N environments, repeated: row i of copy c is c * N + i."""

    def __init__(
        self, constraints: tuple[Constraint, ...], layout: Tensor | None, index: Tensor
    ) -> None:
        self._constraints, self._layout, self._index = constraints, layout, index
        self._known: dict[int, tuple[tuple[Constraint, ...], Tensor | None]] = {}

    def _of(self, copies: int) -> tuple[tuple[Constraint, ...], Tensor | None]:
        if copies not in self._known:
            which = self._index.repeat(copies)
            layout = None if self._layout is None else self._layout[which]
            self._known[copies] = tuple(each.rows(which) for each in self._constraints), layout
        return self._known[copies]

    def constraints(self, copies: int) -> tuple[Constraint, ...]:
        return self._of(copies)[0]

    def layout(self, copies: int) -> Tensor | None:
        return self._of(copies)[1]

    def box(self, box: Box, copies: int) -> Box:
        return Box(box.low.repeat(copies, 1), box.high.repeat(copies, 1))


class Guard:
    """The shield of N running episodes. box: certain to contain the true positions of the dots."""

    def __init__(
        self, shield: Shield, world: World, position: Tensor, layout: Tensor | None
    ) -> None:
        checks.shaped("position", position, None, 2)
        checks.finite("position", position)
        self.shield, self.world = shield, world
        self._rows = _Rows(
            shield.constraints, layout, torch.arange(len(position), device=position.device)
        )
        self.box = around(position, shield.error)
        self._past: list[Tensor] = []  # the last `delay` executed actions
        known = torch.stack([each.of(self.box) for each in shield.constraints]).amin(dim=0)
        self._refuse(known >= ROUNDING, "the first state is not known to be safe")

    def act(self, planned: Tensor, observed: Tensor) -> Tensor:
        """The action [N, 2] to execute in place of the planned one, of any values, NaN included.
        observed: the positions [N, 2] as they were `delay` steps ago. Raises NoSafeAction.
        """
        count = len(self.box.low)
        checks.shaped("planned", planned, count, 2)
        checks.shaped("observed", observed, count, 2)
        self._look(observed)
        tries, least = self._tries(planned)  # [tries, N, 2], [tries]
        boxes = self._rows.box(self.box, len(tries))
        after, clearance = self._next(boxes, tries.flatten(0, 1), len(tries))
        safe = clearance.view(len(tries), count) >= least[:, None]
        again = [
            self._next(after, fallback, len(tries))[1] >= 0
            for fallback in self._fallbacks(after, len(tries))
        ]
        safe = safe & torch.stack(again).any(dim=0).view(len(tries), count)
        self._refuse(safe.any(dim=0), "no action is safe for every outcome")
        first = safe.to(torch.uint8).argmax(dim=0)
        each = torch.arange(count, device=first.device)
        self.box = after.rows(first * count + each)
        action = tries[first, each]
        self._past = [*self._past, action][-self.shield.delay :] if self.shield.delay else []
        return action

    def _look(self, observed: Tensor) -> None:
        """Cut the box with what the observation, and the actions since, allow."""
        checks.finite("observed", observed)
        seen = around(observed, self.shield.error)
        for action in self._past:
            push = pushes(action, self.shield.noise)
            seen = reached(self.world, self._rows.layout(1), seen, push)
        box = self.box.both(seen)
        wrong = (box.low > box.high).any(dim=1)
        self._refuse(~wrong, "the observation contradicts the stated error, noise or delay")
        self.box = box

    def _tries(self, planned: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [tries, N, 2] in the order of preference; [tries]: the clearance that they must
        leave.
        """
        known = torch.isfinite(planned).all(dim=1, keepdim=True)
        wanted = torch.where(known, planned, 0.0).to(self.box.low).clamp(-1, 1)
        shorter = [wanted * share * wanted.new_tensor(axes) for share in SHARES for axes in AXES]
        fallbacks = self._fallbacks(self.box, 1)
        least = wanted.new_tensor([ROUNDING] * len(shorter) + [0.0] * len(fallbacks))
        return torch.stack(shorter + fallbacks), least

    def _fallbacks(self, box: Box, copies: int) -> list[Tensor]:
        """Actions for boxes of `copies` copies of the environments: lean and retreat, and stop."""
        fallbacks = []
        for constraint in self._rows.constraints(copies):
            lean = constraint.lean(box)
            if lean is not None:
                fallbacks += [against(lean, self.shield.noise), lean]
        return [*fallbacks, torch.zeros_like(box.low)]

    def _next(self, box: Box, action: Tensor, copies: int) -> tuple[Box, Tensor]:
        """The boxes after an action, and their clearance."""
        push = pushes(action, self.shield.noise)
        after = reached(self.world, self._rows.layout(copies), box, push)
        values = [each.during(after, push) for each in self._rows.constraints(copies)]
        return after, torch.stack(values).amin(dim=0)

    def _refuse(self, fine: Tensor, why: str) -> None:
        if not bool(fine.all()):
            raise NoSafeAction((~fine).nonzero()[:, 0].tolist(), why)
