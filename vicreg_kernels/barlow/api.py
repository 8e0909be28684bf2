"""The public function of the Barlow Twins op, and its checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.barlow import checks, ranks, reference
from vicreg_kernels.barlow.contract import Settings
from vicreg_kernels.barlow.conventions import CONVENTIONS
from vicreg_kernels.barlow.op import BarlowTwins
from vicreg_kernels.core import calls, dispatch


def _check(
    x: Tensor,
    y: Tensor,
    lambd: float | None,
    convention: str,
    eps: float | None,
    precision: str | None,
    backend: str | None,
    group: str | None,
) -> tuple[Settings, str]:
    """The settings, and the backend that runs."""
    shape, dtype, device, layout = calls.seen("x", x)
    seen_y = calls.seen("y", y)
    numbers = (lambd, convention, eps, precision, backend)
    settings = checks.two_views(shape, dtype, device, layout, *seen_y, *numbers, group is not None)
    if group is not None:
        return settings, distributed.choose_backend(backend, dtype)
    return settings, dispatch.choose("barlow", backend, device, dtype, min(shape))


def barlow_twins_loss(
    x: Tensor,
    y: Tensor,
    *,
    lambd: float | None = None,
    convention: str = "barlow_twins",
    eps: float | None = None,
    process_group: Any = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the Barlow Twins loss of two views (Zbontar et al., 2021, arXiv:2103.03230).

    loss = sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2, C = z1^T z2 / N, where z1 and z2 are the
    views standardised over the batch. This is what BatchNorm without affine does, so none is needed
    before the loss.

    Args:
        x, y: the two views' projections, [N, D], N >= 2; float32, bfloat16, float16 or float64, any
            strides.
        lambd: weight of the off-diagonal sum; None takes the convention's own, 0.0051 for
            "barlow_twins".
        convention: "barlow_twins", "lightly", "solo_learn", "stable_pretraining" or "monai": the
            published implementation whose value and gradient to reproduce (docs/barlow.md has the
            table).
        eps: added where the convention adds its own, to the variance under the root (the
            projections' unit squared) or to the standard deviation (their unit); None takes the
            convention's own.
        process_group: None, True (the default group) or a torch.distributed.ProcessGroup over whose
            ranks the batch is spread, each with its own rows, at least one. The loss is the whole
            batch's, the same on every rank; the gradient is `ranks` times the whole batch's at the
            own rows, so that DistributedDataParallel's mean is one process's gradient
            (docs/distributed.md). Every rank must call, and weigh the loss by the same factor.
        precision: of the products of float32 inputs. None: torch's setting on a GPU
            (torch.set_float32_matmul_precision), full float32 on a CPU. "tf32x3": on "cuda" and
            "triton" three tensor-core products of TF32 parts, whose error stays within float32's
            tolerances whatever torch's setting (docs/barlow.md); "cpu" computes in full float32,
            "reference" with torch's own products, either way. Half and float64 inputs are not
            touched. With a process_group: None.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input. With a
            process_group of several ranks: "reference" or None.

    Returns:
        A 0-d tensor, float32 (float64 for float64 inputs). The gradient has the inputs' dtype.
        Fused backends differentiate once; "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is not one of the above; the
            message names the argument.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    group = None if process_group is None else distributed.group_name(process_group)
    settings, name = distributed.check_on_all_ranks(
        ranks.OP, group, _check, x, y, lambd, convention, eps, precision, backend, group
    )
    if not torch.compiler.is_compiling():
        dispatch.log_choice("barlow", name, backend, x.device, x.shape)
    if group is not None:
        loss = ranks.loss(x, y, settings, name, convention, group)
    elif name == "reference":
        loss = reference.loss(x, y, *settings.as_reference_takes())
    else:
        loss = BarlowTwins.apply(x, y, name, settings)
    scale = CONVENTIONS[convention].scale
    return loss if scale == 1.0 else loss * scale
