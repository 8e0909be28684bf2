"""The public functions of the VICReg op, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.core import calls, dispatch
from vicreg_kernels.vicreg import checks, ranks, reference
from vicreg_kernels.vicreg.contract import Settings
from vicreg_kernels.vicreg.conventions import CONVENTIONS
from vicreg_kernels.vicreg.op import VICReg


class VICRegTerms(NamedTuple):
    """The loss and its three unweighted terms in the convention's scaling, as 0-d tensors."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def _grouped(z: Tensor) -> Tensor:
    return z.unsqueeze(0) if z.dim() == 2 else z


def _terms(
    x: Tensor,
    y: Tensor | None,
    settings: Settings,
    backend: str,
    asked: str | None,
    group: str | None,
    all_terms: bool,
) -> Any:
    """x, y: checked, [N, D] or [G, N, D]; backend: the one chosen, asked: the one asked for."""
    if not torch.compiler.is_compiling():
        shape = x.shape if x.dim() == 3 else (1, *x.shape)
        dispatch.log_choice("vicreg", backend, asked, x.device, shape)
    if group is None and backend != "reference":
        return VICReg.apply(x, y, all_terms, backend, settings)
    x, y = _grouped(x), None if y is None else _grouped(y)
    if group is not None:
        return ranks.terms(x, y, settings, backend, group, all_terms)
    terms = reference.terms(x, y, *settings.as_reference_takes(x.shape[-1]))
    return terms if all_terms else terms[0]


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
) -> tuple[Settings, str]:
    """The settings, and the backend that runs. numbers: weights, margin, eps, convention."""
    shape, dtype, device, layout = calls.seen("x", x)
    others = (*calls.seen("y", y), *numbers, precision, backend, group is not None)
    settings = checks.two_views(shape, dtype, device, layout, *others)
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
    settings, name = distributed.check_on_all_ranks(
        "vicreg", group, _check_two_views, x, y, numbers, precision, backend, group
    )
    if x.dim() > 2:  # batch statistics per position: [B, ..., D] -> [P, B, D]
        x, y = x.flatten(1, -2).transpose(0, 1), y.flatten(1, -2).transpose(0, 1)
    return _terms(x, y, settings, name, backend, group, all_terms)


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


def weighted(terms: VICRegTerms, weights: Sequence[Any], convention: str) -> VICRegTerms:
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


def _weigh_by_tensors(
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
    return weighted(terms, weights, numbers[-1])


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
    """Compute the VICReg loss of two views (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906).

    With C the unbiased covariance over the batch and a, b the convention's factors (docs/vicreg.md
    has the table),

        loss = w_i mean((x - y)^2) + w_v sum_views a mean_d relu(margin - sqrt(var_d + eps))
             + w_c sum_views b sum_{i != j} C_ij^2

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
        return _weigh_by_tensors(x, y, weights, numbers, precision, backend, process_group).loss
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
    """Compute `vicreg_loss` and its three terms, each differentiable.

    It takes the arguments of `vicreg_loss`. Returns VICRegTerms(loss, invariance, variance,
    covariance): 0-d tensors; the terms are unweighted, in the convention's own scaling, and loss
    is their weighted sum.
    """
    weights = (invariance_weight, variance_weight, covariance_weight)
    numbers = (margin, eps, convention)
    if any([isinstance(weight, Tensor) for weight in weights]):
        return _weigh_by_tensors(x, y, weights, numbers, precision, backend, process_group)
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
    """Compute the variance and covariance terms of one set of embeddings.

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
    settings, name = distributed.check_on_all_ranks(
        "vicreg", group, _check_one_view, z, numbers, precision, backend, group
    )
    _, _, variance, covariance = _terms(z, None, settings, name, backend, group, True)
    return variance, covariance


def _check_one_view(
    z: Tensor,
    numbers: Sequence[Any],
    precision: str | None,
    backend: str | None,
    group: str | None,
) -> tuple[Settings, str]:
    shape, dtype, device, layout = calls.seen("z", z)
    others = (*numbers, precision, backend, group is not None)
    settings = checks.one_view(shape, dtype, device, layout, *others)
    return settings, _choose(backend, device, dtype, min(shape[-2:]), group)
