"""The shield between a planner and a world: it lets no action through that may break a constraint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.planning import checks
from vicreg_jepa.planning.guardrails import Constraint, against
from vicreg_jepa.planning.reach import Box, around, pushes, reached
from vicreg_jepa.worlds.world import World

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

    Assumed, and nothing else: (1) a step is World.step: the displacement is 2 * action + u, |u| <=
    `noise` along each axis, and walls only shorten it; no more than MOST_NOISE, so that it can be
    outweighed. (2) Observed positions are within `error` pixels of the true ones along each
    axis, and at most `delay` steps old; the first observation is of the first state. (3) The actions
    that the shield returns are the ones executed. (4) The layout is the true one; without it
    (`walls=False`) nothing is assumed about walls but that they shorten displacements.

    Promised under these: no executed state violates a constraint. The shield keeps a box that holds
    the true position: what the last box and the executed action can reach, cut with what the
    observation allows. It tries the planned action, projected to [-1, 1]; half and a quarter of
    it; its components alone; then the fallbacks: lean, which outweighs the noise away from a zone
    (without noise it is to stop), and retreat at full speed. The first one is executed for which the
    next box is safe and, from there, a fallback is safe again. If there is none, or the first
    state is not known to be safe, it raises NoSafeAction, and nothing is executed.

    With one Zone that never happens after the first step: a displacement that points away from its
    centre, or is 0, along each axis on which the box does not lie across it lowers no distance to the
    zone, whatever walls do; and every later box is inside the one that was predicted. The same
    holds with a Speed of sqrt(8) * noise or more beside it. With several zones, or a Distance or
    Clearance, the promise holds, but the shield may come to refuse.

    probe errors: with `error` from conformal.error the promise holds with that probability for an
    episode, if held-out episodes and the planner's are exchangeable.
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
        checks.number("noise", self.noise)
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

    def clearance(self, box: Box, push: Box | None = None) -> Tensor:
        """[N]: the least clearance of all constraints."""
        values = [
            each.of(box) if push is None else each.during(box, push) for each in self.constraints
        ]
        return torch.stack(values).amin(dim=0)


class Guard:
    """The shield of N running episodes. box: where the dots are, for sure."""

    def __init__(
        self, shield: Shield, world: World, position: Tensor, layout: Tensor | None
    ) -> None:
        checks.shaped("position", position, None, 2)
        checks.finite("position", position)
        self.shield, self.world, self.layout = shield, world, layout
        self.box = around(position, shield.error)
        self._past: list[Tensor] = []  # the last `delay` executed actions
        self._refuse(shield.clearance(self.box) >= ROUNDING, "the first state is not known to be safe")

    def act(self, planned: Tensor, observed: Tensor) -> Tensor:
        """The action [N, 2] to execute in place of the planned one, of any values, NaN included.
        observed: the positions [N, 2] as they were `delay` steps ago. Raises NoSafeAction.
        """
        checks.shaped("planned", planned, len(self.box.low), 2)
        checks.shaped("observed", observed, len(self.box.low), 2)
        self._look(observed)
        tries = self._tries(planned)
        safe = torch.stack([self._safe(*each) for each in tries])  # [tries, N]
        self._refuse(safe.any(dim=0), "no action is safe for every outcome")
        first = safe.to(torch.uint8).argmax(dim=0)
        action = torch.stack([action for action, _ in tries])[first, torch.arange(len(first), device=first.device)]
        push = pushes(action, self.shield.noise)
        self.box = reached(self.world, self.layout, self.box, push)
        self._past = [*self._past, action][-self.shield.delay :] if self.shield.delay else []
        return action

    def _look(self, observed: Tensor) -> None:
        """Cut the box with what the observation, and the actions since, allow."""
        checks.finite("observed", observed)
        seen = around(observed, self.shield.error)
        for action in self._past:
            seen = reached(self.world, self.layout, seen, pushes(action, self.shield.noise))
        box = self.box.both(seen)
        wrong = (box.low > box.high).any(dim=1)
        self._refuse(~wrong, "the observation contradicts the stated error, noise or delay")
        self.box = box

    def _tries(self, planned: Tensor) -> list[tuple[Tensor, float]]:
        """Actions [N, 2] in the order of preference, each with the clearance that it must leave."""
        known = torch.isfinite(planned).all(dim=1, keepdim=True)
        wanted = torch.where(known, planned, 0.0).to(self.box.low).clamp(-1, 1)
        shorter = [wanted * share * wanted.new_tensor(axes) for share in SHARES for axes in AXES]
        tries = [(action, ROUNDING) for action in shorter]
        return tries + [(action, 0.0) for action in self._fallbacks(self.box)]

    def _fallbacks(self, box: Box) -> list[Tensor]:
        found = []
        for constraint in self.shield.constraints:
            lean = constraint.lean(box)
            if lean is not None:
                found += [against(lean, self.shield.noise), lean]
        return [*found, torch.zeros_like(box.low)]

    def _safe(self, action: Tensor, least: float) -> Tensor:
        """bool [N]: whether the next state is safe, and a fallback is safe from there."""
        box, clearance = self._next(self.box, action)
        after = [self._next(box, fallback)[1] >= 0 for fallback in self._fallbacks(box)]
        return (clearance >= least) & torch.stack(after).any(dim=0)

    def _next(self, box: Box, action: Tensor) -> tuple[Box, Tensor]:
        push = pushes(action, self.shield.noise)
        after = reached(self.world, self.layout, box, push)
        return after, self.shield.clearance(after, push)

    def _refuse(self, fine: Tensor, why: str) -> None:
        if not bool(fine.all()):
            raise NoSafeAction((~fine).nonzero()[:, 0].tolist(), why)
