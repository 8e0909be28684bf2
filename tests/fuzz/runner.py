"""Evaluates a line (`inputs.py`) on a backend and holds what comes to the rule.

A call either raises or is right.

**It raises** ValueError or TypeError, and the message begins with the name of an argument; then the
reference raises one of the two as well. A RuntimeError must say that the named backend cannot run
here ("backend='cpu' cannot run ..."), and why.

**It is right**: with `truth` the reference in float64 and `plain` the reference in the inputs'
dtype,

    1. shapes and dtypes are those of `plain`; integers, and what an op only moves (`EXACT`), are
       equal to the bit;
    2. where the truth is NaN, or past the dtype's largest number, the result is not finite; where
       truth and `plain` are finite the result is finite too. Where only `plain` is not (its float32
       squares overflow at 1e30, a variance of 1e-60 is 0), the result may fail in the same way
       but, where finite, must be right: a finite wrong number is what nobody notices. Two
       exceptions: beside a value that is not finite a gradient may be NaN where the reference's is
       0 (the sign of NaN), and attention under a mask may be finite where the reference multiplies
       the NaN of a key that a query does not see by 0. Where an op's page says that a result is NaN
       or a number, it may be (`allowances.may_be_nan`, `may_be_finite`);
    3. over the elements where all three are finite, the error is bounded as in tolerances.py, in
       the 2-norm and in the maximum norm, with these allowances: a few of the dtype's least numbers
       an element (below it, formulas underflow at different places), a few roundings of the terms
       where those may cancel (`allowances.py`; attention's gradients), and, by how far the truth
       moves when every input moves by a rounding (or by as many as `ROUNDINGS` says), what no
       formula can know. Where that moves the truth by more than a tenth (the sine of 1e30, a
       variance at an offset of 1e8 deviations), the numbers are noise and only rule 2 holds.

The gradient is that of a fixed weighted sum of the outputs; a gradient that is not there counts as
zeros. Inputs are as they were, to the bit, and a second run gives the same bits.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vicreg_kernels
from tests.fuzz import allowances, ops
from tests.fuzz.inputs import EPS, Inputs, bits
from tests.helpers.tolerances import FEWEST_ROUNDINGS, PLAIN_FACTOR, _all, _some

OPS = tuple(ops.GENERATORS)
RULES = ("KeyPadding", "Ragged", "FrameCausal", "Blocks", "Rope3d")
# Ops whose outputs every backend gives to the bit.
EXACT = ("gather_tokens", "scatter_tokens", "assemble_tokens", "ema_update_")
# By how much of itself the truth may move under a rounding before it is noise.
NOISE = 0.1
# Patterns of signs in which the inputs are moved by a rounding, besides the two of tolerances.py:
# of a few numbers any one pattern may cancel.
SIGNS = 2
# Roundings that come before a cosine or an exponential of what may be large: an angle is a
# projection, on a direction that backends give a few roundings apart, times a knot; a score is a
# product of rotated rows times `scale`. Others have the input's.
ROUNDINGS = {"sigreg_loss": 6, "masked_attention": 3}
_NAMED = re.compile(r"^(\w+)(\[\d+\])*: ")


class Fault(AssertionError):
    """A line that breaks the rule."""


class Unusable(Exception):
    """A line that fails before an op or a rule is called."""


@dataclass
class Outcome:
    """The values of a call and the gradients of its leaves, or what it raised."""

    values: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    error: Exception | None = None
    changed: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


NAMES = {op: names(getattr(vicreg_kernels, op)) for op in OPS}
NAMES["vicregl_terms"] |= NAMES["vicregl_loss"]
RULE_NAMES = set().union(*(names(getattr(vicreg_kernels, rule)) for rule in RULES))


def op_of(line: str) -> str:
    return line.split("(", 1)[0]


def evaluate(line: str, backend: str | None = None, **inputs: Any) -> Outcome:
    """backend: in place of the line's; inputs: of `Inputs`."""
    made, op = Inputs(**inputs), op_of(line)
    outcome, entered = Outcome(), False

    def call(**arguments: Any) -> Any:
        nonlocal entered
        entered, outcome.arguments = True, arguments
        if backend is not None:
            arguments["backend"] = backend
        return getattr(vicreg_kernels, op)(**arguments)

    words = {rule: getattr(vicreg_kernels, rule) for rule in RULES}
    words |= {"torch": torch, "nan": float("nan"), "inf": float("inf"), op: call}
    words |= {"T": made.tensor, "W": made.output, "I": made.integers}
    try:
        result = eval(line, words)
        outcome.values = _tensors(result) + made.written
        if not any(z.is_meta for z in outcome.values):  # whose leaves are on the CPU
            outcome.gradients = _gradients(outcome.values, made.leaves)
        outcome.values = [z.detach().clone() for z in outcome.values]
    except Exception as error:
        if not entered and not _from_rules(error):
            raise Unusable(str(error)) from None
        outcome.error = error
    outcome.changed = made.changed()
    return outcome


def _from_rules(error: BaseException) -> bool:
    """Whether a rule's constructor raised it, not torch while the arguments were made."""
    trace = error.__traceback__
    while trace is not None:
        if "vicreg_kernels" in trace.tb_frame.f_globals.get("__name__", ""):
            return True
        trace = trace.tb_next
    return False


def _tensors(result: Any) -> list[Tensor]:
    result = (result,) if isinstance(result, Tensor) else (result or ())
    return [z for z in result if isinstance(z, Tensor)]


def _gradients(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of the sum of <output, its weights>, for each leaf that requires a gradient."""
    outputs = [z for z in values if z.requires_grad]
    wanted = [z for z in leaves if z.requires_grad]
    if not outputs or not wanted:
        return []
    gradients = torch.autograd.grad(
        outputs, wanted, list(map(_weights, outputs)), allow_unused=True
    )
    return [torch.zeros_like(z) if g is None else g for z, g in zip(wanted, gradients, strict=True)]


def _weights(like: Tensor) -> Tensor:
    """An incoming gradient, the same for every backend; of one element 1."""
    pattern = torch.arange(like.numel(), dtype=torch.float64).mul(7).add(9).remainder(11).sub(5)
    return pattern.div(4.0).reshape(like.shape).to(like.dtype)


def hold(line: str) -> str:
    """Raise a Fault where the line breaks the rule; else what came: "right", "refused", "meta" (of
    shapes alone) or "noise" (only which numbers are finite could be compared).
    """
    actual = evaluate(line)
    if actual.changed:
        raise Fault("an input was changed")
    if actual.error is not None:
        _hold_error(line, actual.error)
        return "refused"
    if any(z.is_meta for z in actual.values):
        return "meta"
    again, plain = evaluate(line), evaluate(line, "reference")
    for one, two in zip(
        actual.values + actual.gradients, again.values + again.gradients, strict=True
    ):
        if not torch.equal(bits(one), bits(two)):
            raise Fault("two runs differ")
    if plain.error is not None:
        raise Fault(f"it gives a result where the reference raises {plain.error!r}")
    truth = evaluate(line, "reference", wide=True)
    if truth.error is not None:
        raise Fault(f"it gives a result where the reference in float64 raises {truth.error!r}")
    return _Comparison(line, actual, plain, truth).run()


def _hold_error(line: str, error: Exception) -> None:
    op = op_of(line)
    text = str(error)
    if isinstance(error, RuntimeError) and re.match(r"^backend=.* cannot run .* here: ", text):
        return
    if not isinstance(error, (ValueError, TypeError)):
        raise Fault(f"it raises {type(error).__name__}: {text.splitlines()[0][:200]}")
    named = _NAMED.match(text)
    if named is None or named[1] not in NAMES[op] | RULE_NAMES:
        raise Fault(f"no argument's name begins the {type(error).__name__}: {text[:200]}")
    if named[1] != "backend":
        expected = evaluate(line, "reference").error
        if not isinstance(expected, (ValueError, TypeError)):
            raise Fault(f"the reference raises {expected!r}, this {error!r}")


@dataclass
class _Comparison:
    line: str
    actual: Outcome
    plain: Outcome
    truth: Outcome
    noise: bool = False

    def run(self) -> str:
        exact = op_of(self.line) in EXACT
        for kind in ("values", "gradients"):
            actual, plain, truth = (getattr(o, kind) for o in (self.actual, self.plain, self.truth))
            if not len(actual) == len(plain) == len(truth):
                raise Fault(f"{len(actual)} {kind}, {len(plain)} by the reference")
            for i, (one, two, three) in enumerate(zip(actual, plain, truth, strict=True)):
                if one.shape != two.shape or one.dtype != two.dtype:
                    raise Fault(f"{kind} {i}: {one.shape} {one.dtype}, not {two.shape} {two.dtype}")
                if not one.dtype.is_floating_point or (exact and kind == "values"):
                    if not torch.allclose(one, two, rtol=0.0, atol=0.0, equal_nan=True):
                        raise Fault(f"{kind} {i}: not the reference's bits")
                elif one.numel():
                    self.close(kind, i, one, two, three)
        return "noise" if self.noise else "right"

    def close(self, kind: str, i: int, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
        info = torch.finfo(actual.dtype)
        floor = 64 * info.smallest_normal * (info.eps if info.bits == 16 else 1.0)
        floor += self.cancelled(info.eps) if kind == "gradients" else 0.0
        if op_of(self.line) == "sigreg_directions":  # a few roundings apart, as it says
            floor += 16 * info.eps
        floor += self.allowed(kind, i)
        actual, plain, truth = (z.double().flatten() for z in (actual, plain, truth))
        beyond = ~(truth.abs() <= info.max)
        self.hold_finiteness(f"{kind} {i}", actual, plain, truth, beyond)
        kept = actual.isfinite() & ~beyond
        actual, truth = actual[kept], truth[kept]
        usual = torch.where(plain[kept].isfinite(), plain[kept], truth)
        eps = info.eps
        eps = max(eps, allowances.variance_rounding(op_of(self.line), self.truth.arguments))
        if op_of(self.line) == "sigreg_loss":
            steps = EPS * allowances.sigreg_roundings(kind, self.truth.arguments)
            eps = max(eps, steps / FEWEST_ROUNDINGS**0.5)
        if _excess(actual, usual, truth, eps, floor) is None:
            return
        moves = self.moved(kind, i, kept, truth)
        if moves is None:
            self.noise = True
        elif (excess := _excess(actual, usual, truth, eps, floor, moves)) is not None:
            raise Fault(f"{kind} {i}: {excess}")

    def hold_finiteness(
        self, name: str, actual: Tensor, plain: Tensor, truth: Tensor, beyond: Tensor
    ) -> None:
        # Where the reference is finite, it is at the very edge of the range: a rounding decides.
        wrong = beyond & actual.isfinite() & ~plain.isfinite()
        masked = self.actual.arguments.get("mask") is not None
        undefined = masked or (
            name.startswith("gradients")
            and allowances.may_be_finite(op_of(self.line), self.actual.arguments)
        )
        if wrong.any() and not (undefined and truth[wrong].isnan().all()):
            raise Fault(f"{name}: {actual[wrong][0]:.3e} where the truth is {truth[wrong][0]}")
        lost = ~actual.isfinite() & ~beyond & plain.isfinite()
        values_lost = not all(z.isfinite().all() for z in self.plain.values)
        spared = (name.startswith("gradients") and values_lost) or (
            actual[lost].isnan().all()
            and allowances.may_be_nan(op_of(self.line), self.actual.arguments)
        )
        if lost.any() and not spared:
            raise Fault(f"{name}: {actual[lost][0]} where the truth is {truth[lost][0]:.6e}")

    def allowed(self, kind: str, i: int) -> float:
        """A few roundings of the terms of Barlow's loss and gradients, of adaptive layer norm's
        gradients, and of the cosine near 1 in 1 - cosine.
        """
        if op_of(self.line) == "prediction_loss":
            cosine = self.truth.arguments.get("kind") == "cosine"
            return 2.0 * EPS if cosine and kind == "values" else 0.0
        if op_of(self.line) in allowances.ADALN and kind == "gradients":
            return allowances.adaln_floor(op_of(self.line), i, self.truth.arguments)
        if op_of(self.line) != "barlow_twins_loss":
            return 0.0
        value, gradients = allowances.barlow_floors(
            self.truth.arguments, self.truth.values[0].item()
        )
        if kind == "values":
            return value
        leaves = [self.truth.arguments[name].requires_grad for name in "xy"]
        return gradients[1 if i == 1 or not leaves[0] else 0]

    def cancelled(self, eps: float) -> float:
        """A few roundings of the terms of attention's gradients, which cancel where a query sees
        one key.
        """
        if op_of(self.line) != "masked_attention":
            return 0.0
        arguments = self.truth.arguments
        if not all(arguments[n].numel() for n in "qkv"):
            return 0.0
        q, k, v = (arguments[n].detach().double().nan_to_num(0.0, 0.0, 0.0) for n in "qkv")
        scale = arguments.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
        products = _weights(q).norm(dim=-1).max() * v.norm(dim=-1).max() * q.shape[-2] ** 0.5
        size = 4 * eps * scale * products * max(q.abs().max(), k.abs().max())
        return size.nan_to_num(0.0, 0.0).item()

    def moved(self, kind: str, i: int, kept: Tensor, truth: Tensor) -> list[Tensor] | None:
        """How far the truth moves with one rounding of the inputs; None where it is noise."""
        moves = []
        count = ROUNDINGS.get(op_of(self.line), 1)
        for nudge in (_all, _some, *map(_signs, range(SIGNS))):
            near = evaluate(
                self.line,
                "reference",
                wide=True,
                nudge=lambda z, eps, nudge=nudge: nudge(z, count * eps),
            )
            moved = getattr(near, kind)[i].double().flatten()[kept] - truth
            if not moved.isfinite().all() or moved.norm() > NOISE * truth.norm():
                return None
            moves.append(moved)
        if op_of(self.line) == "sigreg_loss":
            with allowances.RoundedCosines():
                near = evaluate(self.line, "reference", wide=True)
            moved = getattr(near, kind)[i].double().flatten()[kept] - truth
            if not moved.norm() <= NOISE * truth.norm():
                return None
            moves.append(moved)
        return moves


def _excess(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    eps: float,
    floor: float,
    moves: Sequence[Tensor] = (),
) -> str | None:
    """By how much the error is past the bound, in words; None where it is not."""
    for norm in (2, float("inf")) if actual.numel() else ():
        error, usual, size, *near = (
            torch.linalg.vector_norm(z, norm).item()
            for z in (actual - truth, plain - truth, truth, *moves)
        )
        bound = PLAIN_FACTOR * (usual + max(near, default=0.0)) + floor * actual.numel() ** 0.5
        bound += eps * FEWEST_ROUNDINGS**0.5 * size
        if not error <= bound:
            return (
                f"{norm}-norm error {error:.2e} > {bound:.2e} (plain {usual:.2e}, truth {size:.2e})"
            )
    return None


def _signs(seed: int) -> Callable[[Tensor, float], Tensor]:
    """A nudge of each element by one rounding, up or down."""

    def nudge(z: Tensor, eps: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        up = torch.rand(z.shape, generator=generator) < 0.5
        return torch.where(up, z * (1.0 + eps), z * (1.0 - eps))

    return nudge
