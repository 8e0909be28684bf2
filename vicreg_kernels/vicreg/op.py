"""Schema, fake, backends, autograd, and the public functions of the VICReg op.

One forward op and one backward op serve every convention and both one and two views: conventions
are scalings (`conventions.py`), groups are a leading dimension. With m = min(N, D):

    terms       float32 [4]            loss, invariance, variance, covariance
    moments     float32 [V, G, 3, D]   column mean as the sum of two floats (a large common offset
                                       costs no digits), column scatter (sum of squared deviations)
    squares     float32 [V, G, m, m]   N < D: the Gram matrix Zc Zc^T, else the scatter matrix
                                       Zc^T Zc with a zero diagonal
    deflated    float32 [V, G, K, N]   N < D: for the K columns of largest scatter, their covariance
                                       gradient before scaling, found without cancellation
    index       int64   [V, G, K]      which columns those are
    centred     [V, G, N, D]           the centred views where a backend's products need them stored
                                       (cuda); else empty

The covariance gradient before scaling is sum_{i != j} z_i (z_i . z_j) for column j. See
docs/vicreg.md for the formulas and docs/cancellation.md for the deflated columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels import dispatch, distributed
from vicreg_kernels.vicreg import backends, ranks, reference
from vicreg_kernels.vicreg.conventions import CONVENTIONS, covariance_scale

NORMALIZERS = ("d", "d(d-1)")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class VICRegTerms(NamedTuple):
    """The loss and its three unweighted terms, in the convention's own scaling; 0-d tensors."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
# The covariance normaliser travels by name: 1 / D as a number would tie a compiled graph to one D.
_SETTINGS = (
    "float margin, float eps, bool unbiased, float[] scales, float[] weights, str normalizer,"
    " str backend"
)
_LIBRARY.define(
    f"vicreg_forward(Tensor x, Tensor? y, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "vicreg_backward(Tensor grads, Tensor x, Tensor? y, Tensor moments, Tensor squares,"
    f" Tensor deflated, Tensor index, Tensor centred, bool need_x, bool need_y, {_SETTINGS})"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "vicreg_forward", "CompositeExplicitAutograd")
def _forward(x: Tensor, y: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    *rest, scales, weights, normalizer, backend = settings
    scales = _normalised(scales, x, normalizer)
    return backends.load(backend).forward(x, y, *rest, scales, weights)


@torch.library.impl(_LIBRARY, "vicreg_backward", "CompositeExplicitAutograd")
def _backward(grads: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, scales, weights, normalizer, backend = args
    scales = _normalised(scales, x, normalizer)
    return backends.load(backend).backward(grads.contiguous(), x, *rest, scales, weights)


def _normalised(scales: Sequence[float], x: Tensor, normalizer: str) -> list[float]:
    return [scales[0], scales[1], scales[2] * covariance_scale(x.shape[-1], normalizer)]


@torch.library.register_fake("vicreg_kernels::vicreg_forward")
def _forward_fake(x: Tensor, y: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    return backends.empty_saved(x, 1 if y is None else 2, settings[-1])


@torch.library.register_fake("vicreg_kernels::vicreg_backward")
def _backward_fake(grads: Tensor, x: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_y = rest[5], rest[6]
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_y = x.new_empty(x.shape if need_y else (0,))
    return grad_x, grad_y


class _VICReg(torch.autograd.Function):
    """Forward saves what the gradient needs; backward is one op call. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, all_terms: bool, settings: tuple[Any, ...]
    ) -> Any:
        terms, *saved = torch.ops.vicreg_kernels.vicreg_forward(x, y, *settings)
        ctx.save_for_backward(x, y, *saved)
        ctx.settings = settings
        return tuple(terms.unbind()) if all_terms else terms[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        grad = torch.stack(grads) if len(grads) > 1 else grads[0].reshape(1)
        args = (grad, x, y, saved, need_x, need_y, ctx.settings)
        run = _Gradient.apply if torch.is_grad_enabled() else _gradient
        grad_x, grad_y = run(*args)
        return grad_x if need_x else None, grad_y if need_y else None, None, None


def _gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    saved: list[Tensor],
    need_x: bool,
    need_y: bool,
    settings: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    return torch.ops.vicreg_kernels.vicreg_backward(grad, x, y, *saved, need_x, need_y, *settings)


class _Gradient(torch.autograd.Function):
    """The backward op under create_graph=True: a second derivative is an error, not a silent 0.

    once_differentiable does not do: autograd.grad can walk past its error node.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        return _gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("the fused VICReg differentiates once; backend='reference' to any order")


def check_settings(
    *,
    margin: float,
    eps: float,
    convention: str = "vicreg",
    covariance_normalizer: str = "d",
    backend: str | None = None,
) -> None:
    """Raise a ValueError that names the first setting out of range."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: got {convention!r}, takes one of {tuple(CONVENTIONS)}")
    if covariance_normalizer not in NORMALIZERS:
        raise ValueError(
            f"covariance_normalizer: got {covariance_normalizer!r}, takes one of {NORMALIZERS}"
        )
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, takes a finite number >= 0")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin: got {margin}, takes a finite number >= 0")
    dispatch.check_backend(backend)


def _check_tensor(name: str, z: Tensor, shapes: str) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name}: got {type(z).__name__}, takes a torch.Tensor")
    if z.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {z.dtype}, takes float32, bfloat16, float16 or float64")
    if z.dim() < 2:
        raise ValueError(f"{name}: got shape {tuple(z.shape)}, takes {shapes}")
    if z.layout != torch.strided:
        raise TypeError(f"{name}: got layout {z.layout}, takes a dense (strided) tensor")


def _check_extent(name: str, z: Tensor, normalizer: str, group: str | None) -> None:
    """z: [G, N, D]."""
    groups, rows, dim = z.shape
    if rows < 2 and group is None:
        raise ValueError(
            f"{name}: got {rows} rows, takes at least 2 (batch statistics need two samples)"
        )
    if rows < 1:
        raise ValueError(f"{name}: got {rows} rows, takes at least 1 on every rank")
    if groups < 1 or dim < 1:
        raise ValueError(f"{name}: got no elements (grouped shape {tuple(z.shape)})")
    if normalizer == "d(d-1)" and dim < 2:
        raise ValueError(f"{name}: got D = 1, takes D >= 2 with the d(d-1) covariance normalizer")


def _terms(
    x: Tensor,
    y: Tensor | None,
    *,
    margin: float,
    eps: float,
    unbiased: bool,
    scales: tuple[float, float, float],
    weights: tuple[float, float, float],
    normalizer: str,
    backend: str | None,
    group: str | None,
    all_terms: bool,
) -> Any:
    """x, y: checked, [G, N, D]. The loss alone, or all four terms."""
    name = _choose(x, backend, group)
    if not torch.compiler.is_compiling():
        dispatch.log_choice("vicreg", name, backend, x.device, x.shape)
    settings = (margin, eps, unbiased, list(scales), list(weights), normalizer)
    if group is not None:
        return ranks.terms(x, y, settings, name, group, all_terms)
    if name == "reference":
        scale = scales[2] * covariance_scale(x.shape[-1], normalizer)
        scales = (scales[0], scales[1], scale)
        out = reference.terms(x, y, margin, eps, unbiased, scales, weights)
        return out if all_terms else out[0]
    return _VICReg.apply(x, y, all_terms, (*settings, name))


def _choose(x: Tensor, backend: str | None, group: str | None) -> str:
    if group is not None:
        return distributed.choose_backend(backend, x.dtype)
    return dispatch.choose("vicreg", backend, x.device, x.dtype, min(x.shape[-2:]))


def _check_two_views(
    x: Tensor,
    y: Tensor,
    weights: Sequence[float | None],
    margin: float,
    eps: float,
    convention: str,
    backend: str | None,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    """x and y as [G, N, D]."""
    check_settings(margin=margin, eps=eps, convention=convention, backend=backend)
    rule = CONVENTIONS[convention]
    shapes = "[N, D] or [B, ..., D]" if rule.positions else "[N, D]"
    _check_tensor("x", x, shapes)
    _check_tensor("y", y, shapes)
    if x.dim() > 2 and not rule.positions:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, takes [N, D] with convention={convention!r}"
        )
    if x.shape != y.shape:
        raise ValueError(f"y: got shape {tuple(y.shape)}, takes x's shape {tuple(x.shape)}")
    if x.dtype != y.dtype:
        raise TypeError(f"y: got dtype {y.dtype}, takes x's dtype {x.dtype}")
    if x.device != y.device:
        raise ValueError(f"y: got device {y.device}, takes x's device {x.device}")
    if x.dim() == 2:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    else:  # batch statistics per position: [B, ..., D] -> [P, B, D]
        x = x.flatten(1, -2).transpose(0, 1)
        y = y.flatten(1, -2).transpose(0, 1)
    _check_extent("x", x, rule.normalizer, group)
    for name, weight in zip(("invariance", "variance", "covariance"), weights, strict=True):
        if weight is not None and not -math.inf < weight < math.inf:
            raise ValueError(f"{name}_weight: got {weight}, takes a finite number or None")
    _choose(x, backend, group)
    return x, y


def _two_views(
    x: Tensor,
    y: Tensor,
    weights: Sequence[float | None],
    margin: float,
    eps: float,
    convention: str,
    backend: str | None,
    process_group: Any,
    all_terms: bool,
) -> Any:
    group = None if process_group is None else distributed.group_name(process_group)
    x, y = distributed.checked(
        "vicreg", group, _check_two_views, x, y, weights, margin, eps, convention, backend, group
    )
    rule = CONVENTIONS[convention]
    own = [w if w is not None else d for w, d in zip(weights, rule.weights, strict=True)]
    return _terms(
        x,
        y,
        margin=margin,
        eps=eps,
        unbiased=True,
        scales=(1.0, rule.variance_view, rule.covariance_view),
        weights=(float(own[0]), float(own[1]), float(own[2])),
        normalizer=rule.normalizer,
        backend=backend,
        group=group,
        all_terms=all_terms,
    )


def vicreg_loss(
    x: Tensor,
    y: Tensor,
    *,
    invariance_weight: float | None = None,
    variance_weight: float | None = None,
    covariance_weight: float | None = None,
    margin: float = 1.0,
    eps: float = 1e-4,
    convention: str = "vicreg",
    backend: str | None = None,
    process_group: Any = None,
) -> Tensor:
    """The VICReg loss of two views (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906).

    loss = w_i mean((x - y)^2) + w_v sum_views a mean_d relu(margin - sqrt(var_d + eps))
         + w_c sum_views b sum_{i != j} C_ij^2, with C the unbiased covariance over the batch and
    a, b the convention's factors (docs/vicreg.md has the table).

    Args:
        x, y: the two views' embeddings, [N, D], N >= 2; float32, bfloat16, float16 or float64, any
            strides. The conventions "lightly" and "vicregl" also take [B, ..., D]: batch
            statistics per position, then the mean over positions.
        invariance_weight, variance_weight, covariance_weight: None takes the convention's own.
        margin: target standard deviation, in the embeddings' unit.
        eps: added to the variance under the root, in the embeddings' unit squared.
        convention: "vicreg", "vicregl", "eb_jepa", "solo_learn", "stable_pretraining", "lightly"
            or "pytorch_metric_learning": the published implementation whose value and gradient to
            reproduce.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input. With a
            process_group of several ranks: "reference" or None.
        process_group: None: the batch is x and y. True (the default group) or a
            torch.distributed.ProcessGroup: x and y are this rank's rows, at least one, of a batch
            that all ranks hold together. The loss is the whole batch's, the same on every rank; the
            gradient is `ranks` times the whole batch's at the own rows, so that
            DistributedDataParallel's mean is one process's gradient (docs/distributed.md). Every
            rank must call, and weigh the loss by the same factor.

    Returns:
        A 0-d tensor, float32 (float64 for float64 inputs). The gradient has the inputs' dtype.
        Fused backends differentiate once; "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is not one of the above; the
            message names the argument.
        RuntimeError: the named backend cannot run here, or another rank failed, did not come within
            the group's timeout, or calls with other settings; the message says why.
    """
    weights = (invariance_weight, variance_weight, covariance_weight)
    return _two_views(
        x, y, weights, margin, eps, convention, backend, process_group, all_terms=False
    )


def vicreg_terms(
    x: Tensor,
    y: Tensor,
    *,
    invariance_weight: float | None = None,
    variance_weight: float | None = None,
    covariance_weight: float | None = None,
    margin: float = 1.0,
    eps: float = 1e-4,
    convention: str = "vicreg",
    backend: str | None = None,
    process_group: Any = None,
) -> VICRegTerms:
    """`vicreg_loss` with its three terms, each differentiable.

    Takes the arguments of `vicreg_loss`. Returns VICRegTerms(loss, invariance, variance,
    covariance): 0-d tensors; the terms are unweighted, in the convention's own scaling, and loss
    is their weighted sum.
    """
    weights = (invariance_weight, variance_weight, covariance_weight)
    terms = _two_views(
        x, y, weights, margin, eps, convention, backend, process_group, all_terms=True
    )
    return VICRegTerms(*terms)


def variance_covariance(
    z: Tensor,
    *,
    margin: float = 1.0,
    eps: float = 1e-4,
    unbiased: bool = True,
    covariance_normalizer: str = "d",
    backend: str | None = None,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The variance and covariance terms of one set of embeddings.

    variance = mean_d relu(margin - sqrt(var_d + eps)); covariance = sum_{i != j} C_ij^2 / D, or
    over D (D - 1). Grouped input (per location, per time step): the mean over groups.

    Args:
        z: [N, D] or grouped [G, N, D], N >= 2; dtypes and strides as in `vicreg_loss`.
        margin, eps: as in `vicreg_loss`.
        unbiased: divide the variance and the covariance by N - 1, else by N.
        covariance_normalizer: "d" or "d(d-1)".
        backend, process_group: as in `vicreg_loss`.

    Returns:
        (variance, covariance), 0-d tensors, float32 (float64 for float64 input).

    Raises: as `vicreg_loss`.
    """
    group = None if process_group is None else distributed.group_name(process_group)
    z = distributed.checked(
        "vicreg", group, _check_one_view, z, margin, eps, covariance_normalizer, backend, group
    )
    _, _, variance, covariance = _terms(
        z,
        None,
        margin=margin,
        eps=eps,
        unbiased=bool(unbiased),
        scales=(0.0, 1.0, 1.0),
        weights=(0.0, 1.0, 1.0),
        normalizer=covariance_normalizer,
        backend=backend,
        group=group,
        all_terms=True,
    )
    return variance, covariance


def _check_one_view(
    z: Tensor,
    margin: float,
    eps: float,
    covariance_normalizer: str,
    backend: str | None,
    group: str | None,
) -> Tensor:
    """z as [G, N, D]."""
    check_settings(
        margin=margin, eps=eps, covariance_normalizer=covariance_normalizer, backend=backend
    )
    _check_tensor("z", z, "[N, D] or [G, N, D]")
    if z.dim() > 3:
        raise ValueError(f"z: got shape {tuple(z.shape)}, takes [N, D] or [G, N, D]")
    z = z.unsqueeze(0) if z.dim() == 2 else z
    _check_extent("z", z, covariance_normalizer, group)
    _choose(z, backend, group)
    return z
