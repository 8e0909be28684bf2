"""The prediction loss: schemas, fakes, autograd and the public function.

Forward: one pass over the predicted rows and the teacher rows they are held to; saved are two
floats a row (four for the cosine). Backward: the same rows once more, one pass, into the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vicreg_kernels.core import calls, dispatch, loader, reals, schema
from vicreg_kernels.core.checks import Seen, not_empty
from vicreg_kernels.core.once import once
from vicreg_kernels.tokens import checks, reference
from vicreg_kernels.tokens.checks import Offsets
from vicreg_kernels.tokens.contract import KINDS, Kernels, Settings, saved_floats
from vicreg_kernels.tokens.rows import check_values, choose

REDUCTIONS = ("masks", "tokens")
Masks: TypeAlias = Tensor | Sequence[Tensor]

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define(
    "tokens_loss_forward(Tensor pred, Tensor teacher, Tensor index, Tensor? offsets, str backend,"
    f" {schema.arguments(Settings)}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "tokens_loss_backward(Tensor grad, Tensor pred, Tensor teacher, Tensor index, Tensor? offsets,"
    f" Tensor saved, str backend, {schema.arguments(Settings)}) -> Tensor"
)


def _forward(
    pred: Tensor,
    teacher: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    backend: str,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    if checks.wanted(backend, index):
        check_values(index, offsets, teacher.shape[1])
    kernels = loader.load("tokens", Kernels, backend)
    return kernels.loss_forward(pred, teacher, index, offsets, *settings)


def _backward(
    grad: Tensor,
    pred: Tensor,
    teacher: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    saved: Tensor,
    backend: str,
    *settings: Any,
) -> Tensor:
    kernels, (kind, normalize, beta, _) = (
        loader.load("tokens", Kernels, backend),
        Settings(*settings),
    )
    where = (pred, teacher, index, offsets, saved)
    return kernels.loss_backward(grad, *where, kind, normalize, beta)


torch.library.impl(_LIBRARY, "tokens_loss_forward", "CompositeExplicitAutograd")(_forward)
torch.library.impl(_LIBRARY, "tokens_loss_backward", "CompositeExplicitAutograd")(_backward)


@torch.library.register_fake("vicreg_kernels::tokens_loss_forward")
def _forward_fake(
    pred: Tensor,
    teacher: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    backend: str,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    saved = (index.numel(), saved_floats(Settings(*settings).kind))
    return (
        pred.new_empty((), dtype=torch.float32),
        pred.new_empty(saved, dtype=torch.float32),
    )


@torch.library.register_fake("vicreg_kernels::tokens_loss_backward")
def _backward_fake(grad: Tensor, pred: Tensor, *rest: Any) -> Tensor:
    return pred.new_empty(pred.shape)


class _Loss(torch.autograd.Function):
    """The gradient of pred alone. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        teacher: Tensor,
        index: Tensor,
        offsets: Tensor | None,
        backend: str,
        settings: Settings,
    ) -> Tensor:
        direct = calls.direct(pred, teacher, index, offsets)
        run = _forward if direct else torch.ops.vicreg_kernels.tokens_loss_forward
        loss, saved = run(pred, teacher, index, offsets, backend, *settings)
        ctx.save_for_backward(pred, teacher, index, offsets, saved)
        ctx.backend, ctx.settings = backend, settings
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        args = (grad, *ctx.saved_tensors, ctx.backend, *ctx.settings)
        return once("prediction loss", _gradient, *args), *(None,) * 5


def _gradient(
    grad: Tensor,
    pred: Tensor,
    teacher: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    *rest: Any,
) -> Tensor:
    direct = calls.direct(grad, pred, teacher, index, offsets)
    run = _backward if direct else torch.ops.vicreg_kernels.tokens_loss_backward
    return run(grad, pred, teacher, index, offsets, *rest)


def check_settings(
    *, kind: str, beta: float, eps: float, reduction: str, backend: str | None
) -> None:
    """Raise a ValueError that names the first setting out of range."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, takes one of {KINDS}")
    reals.finite("beta", beta, 0)
    reals.finite("eps", eps, 0)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, takes one of {REDUCTIONS}")
    dispatch.check_backend(backend)


@calls.remembered
def _check_one_mask(
    packed: bool,
    kind: str,
    normalize: bool,
    beta: float,
    eps: float,
    reduction: str,
    backend: str | None,
    *seen: Any,
) -> Settings:
    """The op's settings. seen: pred, teacher, index."""
    check_settings(kind=kind, beta=beta, eps=eps, reduction=reduction, backend=backend)
    pred, teacher, index = checks.each(seen)
    checks.tensor("teacher", teacher, (3,), "[B, T, D]")
    not_empty("teacher", teacher[0])
    _check_pred(pred, teacher, packed)
    checks.index("index", index, packed, "[total] with offsets" if packed else "[B, K]", teacher[2])
    rows, batch = index[0], teacher[0][0]
    if rows != pred[0][:-1]:
        raise ValueError(
            f"index: got shape {tuple(rows)}, takes that of pred's rows, {tuple(pred[0][:-1])}"
        )
    if not packed and rows[0] % batch != 0:
        raise ValueError(f"index: got {rows[0]} samples, takes the teacher's {batch} or a multiple")
    if rows.numel() == 0:
        raise ValueError("index: got no tokens, takes at least one (a mean over none is undefined)")
    return Settings(KINDS.index(kind), bool(normalize), float(beta), float(eps))


def _check_pred(pred: Seen, teacher: Seen, packed: bool) -> None:
    shapes = "[total, D] with offsets" if packed else "[B, K, D]"
    checks.tensor("pred", pred, (2,) if packed else (3,), shapes)
    shape, dtype, device, _ = pred
    if shape[-1] != teacher[0][-1]:
        raise ValueError(f"pred: got D = {shape[-1]}, takes the teacher's D = {teacher[0][-1]}")
    checks.same_device("pred", device, teacher[2])
    if (dtype == torch.float64) != (teacher[1] == torch.float64):
        raise TypeError(
            f"pred: got dtype {dtype} with a teacher of {teacher[1]}, takes float64 with"
            " float64, or any two of float32, bfloat16 and float16"
        )


def _one_mask(
    pred: Tensor, teacher: Tensor, index: Tensor, offsets: Offsets | None, numbers: tuple[Any, ...]
) -> Tensor:
    """The mean over one mask's rows. numbers: kind to backend, as `_check_one_mask` takes them."""
    seen = calls.seen("pred", pred)
    others = (*calls.seen("teacher", teacher), *calls.seen("index", index))
    settings = _check_one_mask(offsets is not None, *numbers, *seen, *others)
    at = None
    if offsets is not None:
        at = checks.offsets("offsets", offsets, teacher.shape[0], index.shape[0], teacher)
    name = choose(numbers[-1], seen)
    if name == "reference":
        if checks.wanted(name, index):
            check_values(index, at, teacher.shape[1])
        kind, normalize, beta, eps = settings
        return reference.loss(pred, teacher, index, at, KINDS[kind], normalize, beta, eps)
    return _Loss.apply(pred, teacher, index.contiguous(), at, name, settings)


def _stacked(pred: Tensor, teacher: Tensor, index: Sequence[Tensor]) -> Tensor:
    """The index of mask-major predictions [M E B, K, D] from M masks [B, K]; E contexts each."""
    for one in index:
        seen = calls.seen("index", one)
        checks.index("index", seen, False, "[B, K] for each mask", teacher.device)
        if one.shape != index[0].shape:
            raise ValueError(
                f"index: got masks of {tuple(index[0].shape)} and {tuple(one.shape)}, takes equal"
                " ones with one tensor of predictions; give a list of predictions for others"
            )
    rows = len(index) * index[0].shape[0]
    if pred.dim() != 3 or rows == 0 or pred.shape[0] % rows != 0:
        raise ValueError(
            f"pred: got shape {tuple(pred.shape)}, takes [M B, K, D] with M B = {rows}, mask-major,"
            " or a multiple of it for several contexts"
        )
    contexts = pred.shape[0] // rows
    return torch.cat([one.repeat(contexts, 1) if contexts != 1 else one for one in index])


def prediction_loss(
    pred: Masks,
    teacher: Tensor,
    index: Masks,
    *,
    kind: str = "smooth_l1",
    normalize_target: bool = True,
    beta: float = 1.0,
    eps: float = 1e-5,
    offsets: Offsets | Sequence[Offsets] | None = None,
    reduction: str = "masks",
    backend: str | None = None,
) -> Tensor:
    """Compute the loss between predicted tokens and the teacher's tokens at the same places.

    Let z be the teacher's row at `index`, layer-normed over D without affine if `normalize_target`,
    and d = pred - z. The loss is the mean over all elements of

        smooth_l1   d^2 / (2 beta) where |d| < beta, else |d| - beta / 2     (I-JEPA)
        l1          |d|                                                      (V-JEPA, V-JEPA 2)
        mse         d^2

    or, for cosine, the mean over rows of 1 - cos(pred, z). Sources: Assran et al., 2023,
    arXiv:2301.08243 (I-JEPA: smooth L1 with beta = 1, mean over everything) and Bardes et al.,
    2024, arXiv:2404.08471 (V-JEPA: L1, mean of each mask, then over masks).

    Args:
        pred: predicted rows, in one of these forms; float32, bfloat16, float16 or float64, any
            strides:
            [B, K, D] with index [B, K];
            [M B, K, D], mask-major, with index [M B, K] or a list of M of [B, K] (I-JEPA); [M E B,
            K, D] with a list of M masks where each was predicted from E contexts;
            a list of M of [B, K_m, D] with a list of M of [B, K_m] (V-JEPA);
            packed [total, D] with index [total] and offsets, or lists of all three.
        teacher: [B, T, D]; its dtype may differ from pred's (float64 goes with float64). It gets no
            gradient, and must not require one.
        index: int32 or int64, in [0, T).
        kind: "smooth_l1", "l1", "mse" or "cosine".
        normalize_target: layer-norm the teacher's rows.
        beta: the difference at which smooth L1 becomes linear, in the targets' unit; 0 is L1.
        eps: added to the variance in the layer norm.
        offsets: as in `gather_tokens`; samples without a token are fine.
        reduction: over a list of masks: "masks", the mean of each mask's mean, or "tokens", the
            mean over the tokens of all masks. Both are the same if masks are equally large.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input.

    Returns:
        A 0-d tensor, float32 (float64 for float64 inputs). The gradient has pred's dtype. Fused
        backends differentiate once; "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device, index or setting that is not one of the
            above, or a mask without tokens; the message names the argument. On a GPU the values of
            index and offsets are checked where VICREG_KERNELS_DEBUG=1; without it an index out of
            range makes the loss, and its row's gradient, NaN.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher: got {type(teacher).__name__}, takes a torch.Tensor")
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher: got a tensor that requires grad, takes one without (run the teacher under"
            " torch.no_grad, or pass teacher.detach()): its gradient is not computed"
        )
    numbers = (kind, normalize_target, beta, eps, reduction, backend)
    if isinstance(pred, Tensor):
        if isinstance(index, (list, tuple)):
            if len(index) == 0:
                raise ValueError("index: got no masks, takes at least one")
            index = _stacked(pred, teacher, index)
        return _one_mask(pred, teacher, index, offsets, numbers)
    if not isinstance(pred, (list, tuple)):
        raise TypeError(f"pred: got {type(pred).__name__}, takes a torch.Tensor or a list of them")
    if not isinstance(index, (list, tuple)) or len(index) != len(pred) or len(pred) == 0:
        got = len(index) if isinstance(index, (list, tuple)) else type(index).__name__
        raise ValueError(
            f"index: got {got}, takes a list with one mask for each of pred's {len(pred)}"
        )
    if offsets is not None and (
        not isinstance(offsets, (list, tuple)) or len(offsets) != len(pred)
    ):
        raise ValueError(f"offsets: takes a list with one for each of pred's {len(pred)} masks")
    each = [None] * len(pred) if offsets is None else offsets
    losses = [
        _one_mask(p, teacher, i, o, numbers) for p, i, o in zip(pred, index, each, strict=True)
    ]
    if reduction == "masks":
        return torch.stack(losses).mean()
    rows = [i.numel() for i in index]
    return sum(loss * (count / sum(rows)) for loss, count in zip(losses, rows, strict=True))
