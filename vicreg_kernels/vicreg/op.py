"""Schema, fake, backends, autograd, and the public functions of the VICReg op.

One forward op and one backward op serve every convention and both one and two views: conventions
are scalings (`conventions.py`), groups are a leading dimension, which [N, D] does without. With
m = min(N, D) and G = 1 for [N, D]:

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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels import calls, dispatch, distributed
from vicreg_kernels.vicreg import backends, checks, ranks, reference
from vicreg_kernels.vicreg.conventions import CONVENTIONS, covariance_scale


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
    " bool tf32x3, str backend"
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
    return backends.load(settings[-1]).forward(x, y, *_ready(x.shape[-1], settings[:-1]))


@torch.library.impl(_LIBRARY, "vicreg_backward", "CompositeExplicitAutograd")
def _backward(grads: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    ready = _ready(x.shape[-1], args[-8:-1])
    return backends.load(args[-1]).backward(grads.contiguous(), x, *args[:-8], *ready)


def _ready(dim: int, settings: Sequence[Any]) -> tuple[Any, ...]:
    """settings: all but the backend, as the op takes them; here as a kernel does."""
    margin, eps, unbiased, own, weights, normalizer, tf32x3 = settings
    invariance, variance, covariance = own
    scales = [invariance, variance, covariance * covariance_scale(dim, normalizer)]
    return margin, eps, unbiased, scales, weights, tf32x3


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
        ctx.settings = settings
        run = _forward if calls.direct(x, y) else torch.ops.vicreg_kernels.vicreg_forward
        terms, *saved = run(x, y, *settings)
        ctx.save_for_backward(x, y, *saved)
        return terms.unbind() if all_terms else terms[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        need_x, need_y, *_ = ctx.needs_input_grad
        grad = torch.stack(grads) if len(grads) > 1 else grads[0]
        args = (grad, x, y, saved, need_x, need_y, ctx.settings)
        run = _Gradient.apply if torch.is_grad_enabled() else _gradient
        grad_x, grad_y = run(*args)
        return grad_x, grad_y, None, None


def _gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    saved: list[Tensor],
    need_x: bool,
    need_y: bool,
    settings: tuple[Any, ...],
) -> tuple[Tensor | None, Tensor | None]:
    run = _backward if calls.direct(grad, x, y) else torch.ops.vicreg_kernels.vicreg_backward
    grad_x, grad_y = run(grad, x, y, *saved, need_x, need_y, *settings)
    return grad_x if need_x else None, grad_y if need_y else None


class _Gradient(torch.autograd.Function):
    """The backward op under create_graph=True: a second derivative is an error, not a silent 0.

    once_differentiable does not do: autograd.grad can walk past its error node.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, Tensor | None]:
        return _gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("the fused VICReg differentiates once; backend='reference' to any order")


def _grouped(z: Tensor) -> Tensor:
    return z.unsqueeze(0) if z.dim() == 2 else z


def _terms(
    x: Tensor,
    y: Tensor | None,
    settings: checks.Settings,
    precision: str | None,
    name: str,
    backend: str | None,
    group: str | None,
    all_terms: bool,
) -> Any:
    """x, y: checked, [N, D] or [G, N, D]; name: the backend chosen for `backend`."""
    if not torch.compiler.is_compiling():
        shape = x.shape if x.dim() == 3 else (1, *x.shape)
        dispatch.log_choice("vicreg", name, backend, x.device, shape)
    if group is None and name != "reference":
        return _VICReg.apply(x, y, all_terms, (*settings, precision == "tf32x3", name))
    x, y = _grouped(x), None if y is None else _grouped(y)
    if group is not None:
        return ranks.terms(x, y, settings, name, group, all_terms)
    margin, eps, unbiased, scales, weights, normalizer = settings
    scale = scales[2] * covariance_scale(x.shape[-1], normalizer)
    scales = (scales[0], scales[1], scale)
    out = reference.terms(x, y, margin, eps, unbiased, scales, weights)
    return out if all_terms else out[0]


def _choose(
    backend: str | None, device: torch.device, dtype: torch.dtype, side: int, group: str | None
) -> str:
    if group is not None:
        return distributed.choose_backend(backend, dtype)
    return dispatch.choose("vicreg", backend, device, dtype, side)


def _check_two_views(
    x: Tensor,
    y: Tensor,
    numbers: Sequence[Any],
    precision: str | None,
    backend: str | None,
    group: str | None,
) -> tuple[checks.Settings, str]:
    """The settings, and the backend that runs. numbers: weights, margin, eps, convention."""
    checks.check_precision(precision, group)
    shape, dtype, device, layout = calls.seen("x", x)
    settings = checks.two_views(
        shape, dtype, device, layout, *calls.seen("y", y), *numbers, backend, group is not None
    )
    return settings, _choose(backend, device, dtype, min(shape[0], shape[-1]), group)


def _two_views(
    x: Tensor,
    y: Tensor,
    numbers: Sequence[Any],
    precision: str | None,
    backend: str | None,
    process_group: Any,
    all_terms: bool,
) -> Any:
    group = None if process_group is None else distributed.group_name(process_group)
    settings, name = distributed.checked(
        "vicreg", group, _check_two_views, x, y, numbers, precision, backend, group
    )
    if x.dim() > 2:  # batch statistics per position: [B, ..., D] -> [P, B, D]
        x, y = x.flatten(1, -2).transpose(0, 1), y.flatten(1, -2).transpose(0, 1)
    return _terms(x, y, settings, precision, name, backend, group, all_terms)


def _check_weight(name: str, weight: Tensor, terms: VICRegTerms) -> Tensor:
    """A weight that is a tensor, as the terms are: 0-d, of their dtype. Its value is not read."""
    if weight.numel() != 1 or not weight.is_floating_point():
        raise TypeError(
            f"{name}: got a tensor of shape {tuple(weight.shape)} and dtype {weight.dtype}, takes "
            "a finite number, a float tensor of one element, or None"
        )
    if weight.device.type != "cpu" and weight.device != terms.loss.device:
        raise ValueError(
            f"{name}: got device {weight.device}, takes x's {terms.loss.device}, or cpu"
        )
    return weight.reshape(()).to(terms.loss.dtype)


def _weighted(terms: VICRegTerms, weights: Sequence[Any], convention: str) -> VICRegTerms:
    """The terms with the loss of weights of which some are tensors, which may want gradients."""
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    usual = CONVENTIONS[convention].weights
    loss: Any = 0.0
    for name, weight, own, term in zip(names, weights, usual, terms[1:], strict=True):
        if isinstance(weight, Tensor):
            loss = loss + _check_weight(name, weight, terms) * term
        else:
            loss = loss + (own if weight is None else weight) * term
    return terms._replace(loss=loss)


def _of_tensors(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Any],
    numbers: Sequence[Any],
    precision: str | None,
    backend: str | None,
    process_group: Any,
) -> VICRegTerms:
    """`vicreg_terms` where a weight is a tensor: the loss is put together outside of the op, so
    that the weight gets its gradient, and none is waited for.
    """
    plain = [None if isinstance(weight, Tensor) else weight for weight in weights]
    settings = (precision, backend, process_group)
    terms = VICRegTerms(*_two_views(x, y, (*plain, *numbers), *settings, True))
    return _weighted(terms, weights, numbers[-1])


def vicreg_loss(
    x: Tensor,
    y: Tensor,
    *,
    invariance_weight: float | Tensor | None = None,
    variance_weight: float | Tensor | None = None,
    covariance_weight: float | Tensor | None = None,
    margin: float = 1.0,
    eps: float = 1e-4,
    convention: str = "vicreg",
    precision: str | None = None,
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
        invariance_weight, variance_weight, covariance_weight: None takes the convention's own. A
            float tensor of one element gets its gradient, so that weights can be learned.
        margin: target standard deviation, in the embeddings' unit.
        eps: added to the variance under the root, in the embeddings' unit squared.
        convention: "vicreg", "vicregl", "eb_jepa", "solo_learn", "stable_pretraining", "lightly"
            or "pytorch_metric_learning": the published implementation whose value and gradient to
            reproduce.
        precision: of the products of float32 inputs. None: torch's setting on a GPU
            (torch.set_float32_matmul_precision), full float32 on a CPU. "tf32x3": on "cuda" and
            "triton" three tensor-core products of TF32 parts, whose error stays within float32's
            tolerances whatever torch's setting (docs/vicreg.md); "cpu" computes in full float32,
            "reference" with torch's own products, either way. Half and float64 inputs are not
            touched. With a process_group: None.
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
    numbers = (margin, eps, convention)
    if any([isinstance(weight, Tensor) for weight in weights]):
        return _of_tensors(x, y, weights, numbers, precision, backend, process_group).loss
    return _two_views(x, y, (*weights, *numbers), precision, backend, process_group, False)


def vicreg_terms(
    x: Tensor,
    y: Tensor,
    *,
    invariance_weight: float | Tensor | None = None,
    variance_weight: float | Tensor | None = None,
    covariance_weight: float | Tensor | None = None,
    margin: float = 1.0,
    eps: float = 1e-4,
    convention: str = "vicreg",
    precision: str | None = None,
    backend: str | None = None,
    process_group: Any = None,
) -> VICRegTerms:
    """`vicreg_loss` with its three terms, each differentiable.

    Takes the arguments of `vicreg_loss`. Returns VICRegTerms(loss, invariance, variance,
    covariance): 0-d tensors; the terms are unweighted, in the convention's own scaling, and loss
    is their weighted sum.
    """
    weights = (invariance_weight, variance_weight, covariance_weight)
    numbers = (margin, eps, convention)
    if any([isinstance(weight, Tensor) for weight in weights]):
        return _of_tensors(x, y, weights, numbers, precision, backend, process_group)
    settings = (precision, backend, process_group)
    return VICRegTerms(*_two_views(x, y, (*weights, *numbers), *settings, True))


def variance_covariance(
    z: Tensor,
    *,
    margin: float = 1.0,
    eps: float = 1e-4,
    unbiased: bool = True,
    covariance_normalizer: str = "d",
    precision: str | None = None,
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
        precision, backend, process_group: as in `vicreg_loss`.

    Returns:
        (variance, covariance), 0-d tensors, float32 (float64 for float64 input).

    Raises: as `vicreg_loss`.
    """
    group = None if process_group is None else distributed.group_name(process_group)
    numbers = (margin, eps, unbiased, covariance_normalizer)
    settings, name = distributed.checked(
        "vicreg", group, _check_one_view, z, numbers, precision, backend, group
    )
    _, _, variance, covariance = _terms(z, None, settings, precision, name, backend, group, True)
    return variance, covariance


def _check_one_view(
    z: Tensor,
    numbers: Sequence[Any],
    precision: str | None,
    backend: str | None,
    group: str | None,
) -> tuple[checks.Settings, str]:
    checks.check_precision(precision, group)
    shape, dtype, device, layout = calls.seen("z", z)
    settings = checks.one_view(shape, dtype, device, layout, *numbers, backend, group is not None)
    return settings, _choose(backend, device, dtype, min(shape[-2:]), group)
