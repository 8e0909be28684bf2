"""What the rule of `runner.py` allows an op by what its formula does in float32: each allowance is
computed from the line's own inputs in float64, and says which numbers float32 cannot know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.fuzz.inputs import EPS
from vicreg_kernels.barlow.conventions import CONVENTIONS

MOST, LEAST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
# Roundings that an entry of Barlow's correlation, about 1 in size, is off by.
ENTRY = 2.0
# The ops of adaptive layer norm, and their tensors in the order of their gradients.
ADALN = {"modulated_layer_norm": ("x", "shift", "scale"), "gated_residual": ("x", "y", "gate")}
_VICREG = ("vicreg_loss", "vicreg_terms", "variance_covariance", "vicregl_loss", "vicregl_terms")


def _wide(z: Any) -> Tensor:
    return z.detach().double()


def may_be_nan(op: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a result may be NaN where the reference's is a number.

    Barlow Twins: where float32 does not hold a column's sum of squares, or its variance is not a
    normal number and eps = 0 (docs/barlow.md). Attention: where a score in base 2, or a gradient
    before it is scaled, may be past float32 (docs/attention.md). A prediction loss: where float32
    does not hold a row's sum of squares, or a teacher's variance + eps is not a normal number
    (docs/tokens.md).
    """
    if op == "barlow_twins_loss":
        return any(map(_unheld, _views(arguments)))
    if op == "prediction_loss":
        given = [arguments["teacher"], arguments["pred"]]
        rows = [*given[:1], *(given[1] if isinstance(given[1], list | tuple) else given[1:])]
        if any(bool((_wide(z).square().sum(-1) > MOST / 4).any()) for z in rows):
            return True
        variance = _wide(given[0]).var(-1, correction=0) + float(arguments.get("eps", 1e-5))
        return bool((variance < 2 * LEAST).any())
    if op == "masked_attention":
        sizes = [_wide(arguments[name]).norm(dim=-1) for name in ("q", "k")]
        sizes = [size[size.isfinite()] for size in sizes]
        if not all(size.numel() for size in sizes):
            return False
        scale = arguments.get("scale")
        scale = arguments["q"].shape[-1] ** -0.5 if scale is None else abs(float(scale))
        return bool(sizes[0].max() * sizes[1].max() * max(scale / math.log(2.0), 1.0) > MOST)
    return False


def may_be_finite(op: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a gradient may be a number where the truth is NaN: VICReg with eps = 0 and
    margin = 0, where the reference multiplies the hinge's 0 by the infinite derivative of a root
    at 0 (docs/vicreg.md).
    """
    return op in _VICREG and arguments.get("eps") == 0 and arguments.get("margin") == 0


def variance_rounding(op: str, arguments: Mapping[str, Any]) -> float:
    """The relative rounding of the smallest variance of a column, VICReg's with eps = 0: past the
    least normal number float32 keeps ever fewer digits of it, and its root divides the gradient.
    """
    if op not in _VICREG or arguments.get("eps") != 0:
        return 0.0
    views = (_wide(arguments[name]) for name in "xyz" if arguments.get(name) is not None)
    variances = [view.var(dim=-2) for view in views if view.dim() >= 2 and view.shape[-2] > 1]
    least = min((float(v[v > 0].min()) for v in variances if bool((v > 0).any())), default=LEAST)
    return EPS * max(LEAST / least, 1.0) if least < LEAST else 0.0


def _settings(arguments: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """(eps under the root, eps beside it, degrees lost, lambd) of a call of Barlow's."""
    rule = CONVENTIONS[arguments.get("convention", "barlow_twins")]
    eps, lambd = arguments.get("eps"), arguments.get("lambd")
    eps = rule.eps if eps is None else float(eps)
    root, beside = (0.0, eps) if rule.eps_on_std else (eps, 0.0)
    return root, beside, float(rule.unbiased), rule.lambd if lambd is None else float(lambd)


def _views(arguments: Mapping[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of x and of y: the centred values, the columns' scatter, and what is added to the scatter's
    share before the root, eps of either kind.
    """
    root, beside, lost, _ = _settings(arguments)
    statistics = []
    for name in "xy":
        z = _wide(arguments[name])
        centred = z - z.mean(0)
        scatter = centred.square().sum(0)
        statistics.append((centred, scatter, scatter / (len(z) - lost) + root + beside))
    return statistics


def _unheld(view: tuple[Tensor, Tensor, Tensor]) -> bool:
    _, scatter, variance = view
    return bool((scatter > MOST / 4).any() or (variance < 2 * LEAST).any())


def barlow_floors(arguments: Mapping[str, Any], loss: float) -> tuple[float, list[float]]:
    """Absolute allowances (of the loss, of each gradient's elements) for a few roundings of the
    terms before they cancel: C_ii - 1 where the views agree, and the gradient of two or three rows,
    whose parts along the column mean and along z are all of it.
    """
    root, beside, lost, lambd = _settings(arguments)
    scale = CONVENTIONS[arguments.get("convention", "barlow_twins")].scale
    (one, scatter1, _), (two, scatter2, _) = _views(arguments)
    rows, dim = one.shape
    inverse = [1.0 / ((s / (rows - lost) + root).sqrt() + beside) for s in (scatter1, scatter2)]
    z = [(c * i).abs().nan_to_num(0.0) for c, i in zip((one, two), inverse, strict=True)]
    terms = z[0].T @ z[1] / rows  # |C| with every term taken as positive
    off = abs(lambd) * (terms - terms.diagonal().diag())
    entry = ENTRY * EPS * scale
    # The loss is the square of a norm, and each entry's part in it is ENTRY roundings off.
    parts = ENTRY * EPS * (scale * dim * (1.0 + abs(lambd) * dim)) ** 0.5
    value = parts * (2.0 * abs(loss) ** 0.5 + parts)
    floors = []
    for own, other, inv, part in ((z[0], z[1], inverse[0], off.T), (z[1], z[0], inverse[1], off)):
        slope = 2.0 / rows * (other @ part + (1.0 + terms.diagonal()) * other)
        radial = (slope * own).sum(0) / rows * own
        floors.append(entry * (inv.nan_to_num(0.0) * (slope + slope.mean(0) + radial)).max().item())
    return _number(value), [_number(floor) for floor in floors]


def adaln_floor(op: str, i: int, arguments: Mapping[str, Any]) -> float:
    """An absolute allowance of the i-th gradient of an op of ADALN, a few roundings of the terms
    that cancel in it: of x's in a token of one or two elements, of a condition's over tokens.
    """
    name = [name for name in ADALN[op] if arguments[name].requires_grad][i]
    if name == "gate":
        return _sum_floor(_wide(arguments["y"]))
    if name == "scale":
        x = _wide(arguments["x"])
        return _sum_floor((x - x.mean(dim=-1, keepdim=True)) * _inverse(arguments)[..., None])
    return _norm_floor(arguments) if (op, name) == ("modulated_layer_norm", "x") else 0.0


def _inverse(arguments: Mapping[str, Any]) -> Tensor:
    variance = _wide(arguments["x"]).var(dim=-1, correction=0)
    return (variance + float(arguments.get("eps", 1e-6))).rsqrt()


def _sum_floor(terms: Tensor) -> float:
    """Of a sum over the tokens of terms [..., T, D], each times a weight of at most 1.25, the
    largest of runner._weights.
    """
    held = terms.nan_to_num(0.0, 0.0, 0.0).reshape(-1, terms.shape[-1])
    return _number(4.0 * EPS * held.norm(dim=0).max().item()) if held.numel() else 0.0


def _norm_floor(arguments: Mapping[str, Any]) -> float:
    """Of x's gradient. A normalised element is off by the rounding of the token's mean, saved in
    float32, over its standard deviation.
    """
    x, scale, inverse = _wide(arguments["x"]), _wide(arguments["scale"]), _inverse(arguments)
    parts = inverse * (1.0 + x.mean(dim=-1).abs() * inverse)
    known = [z[z.isfinite()] for z in (parts, 1.0 + scale)]  # what is NaN stays in its token
    if not all(z.numel() for z in known):
        return 0.0
    return _number(8.0 * EPS * (known[1].abs().max() * known[0].max()).item())


def _number(floor: float) -> float:
    return floor if floor < MOST else 0.0


class RoundedCosines(TorchFunctionMode):
    """The reference of SIGReg with every cosine of an angle half a rounding of 1 too small: where
    C / count and exp(-t^2 / 2) are both nearly 1, their difference is made of such roundings.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not Tensor.cos or result.dim() != 4:  # of angles [G, N, M, K]
            return result
        return result - 0.5 * EPS


def sigreg_roundings(kind: str, arguments: Mapping[str, Any]) -> float:
    """Relative roundings of a gradient, or of the loss of rows that are alike: the angles of K
    equally spaced knots follow from the first one's by K steps, each of a cosine and a sine that
    are rounded. In a sum over different rows these errors average out (docs/sigreg.md).
    """
    rows = arguments["z"]
    if kind == "values" and not bool((rows == rows[..., :1, :]).all()):
        return 0.0
    knots = arguments.get("knots", 17)
    return 2.0 * (17 if knots is None else knots if isinstance(knots, int) else len(knots))
