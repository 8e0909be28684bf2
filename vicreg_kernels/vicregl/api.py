"""The public functions of VICRegL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.core import dispatch
from vicreg_kernels.vicregl import checks, ranks, reference
from vicreg_kernels.vicregl.compose import Run, composed


class VICRegLTerms(NamedTuple):
    """The loss and its unweighted terms of the embeddings and of the maps, as 0-d tensors."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor
    local_invariance: Tensor
    local_variance: Tensor
    local_covariance: Tensor


def _check(
    embeddings: Sequence[Tensor] | None,
    maps: Sequence[Tensor] | None,
    grids: Sequence[Tensor] | None,
    backend: str | None,
    group: str | None,
    settings: dict[str, Any],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Run]:
    setting = checks.settings(**settings, backend=backend)
    rows = 2 if group is None else 1
    vectors, flat, places = checks.tensors(embeddings, maps, grids, setting, rows)
    like = (vectors or flat)[0]
    if group is not None:
        name = ranks.choose(backend, like)
    else:
        name = dispatch.choose("vicregl", backend, like.device.type, like.dtype)
    if name != "reference":
        places = [place.float() for place in places]
    return vectors, flat, places, Run(setting, name, backend, group, like.shape[0])


def _terms(
    embeddings: Sequence[Tensor] | None,
    maps: Sequence[Tensor] | None,
    grids: Sequence[Tensor] | None,
    process_group: Any,
    backend: str | None,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:
    group = None if process_group is None else distributed.group_name(process_group)
    *views, run = distributed.check_on_all_ranks(
        ranks.OP, group, _check, embeddings, maps, grids, backend, group, settings
    )
    vectors, flat, places = views
    if not torch.compiler.is_compiling():
        like = (flat or vectors)[0]
        dispatch.log_choice("vicregl", run.backend, backend, like.device, like.shape)
    if run.backend == "reference" and group is None:
        return reference.terms(vectors, flat, places, run.setting)
    return composed(vectors, flat, places, run)


def vicregl_loss(
    embeddings: Sequence[Tensor] | None,
    maps: Sequence[Tensor] | None,
    grids: Sequence[Tensor] | None,
    *,
    alpha: float = 0.75,
    num_matches: Sequence[int | None] = (20, 4),
    l2_all_matches: bool = True,
    fast_vc_reg: bool = False,
    covariance: str = "all_views",
    match_order: str = "position",
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    margin: float = 1.0,
    eps: float = 1e-4,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the VICRegL loss of two large and any number of small views (Bardes, Ponce and LeCun,
    2022, arXiv:2210.01571).

    loss = alpha L(embeddings) + (1 - alpha) L(maps), L = w_i invariance + w_v variance + w_c
    covariance. Of the embeddings, the invariance is the mean of mean((z_i - z_j)^2) over the
    ordered pairs of a large view i and another view j, and variance and covariance are the means
    over views of mean_d relu(margin - sqrt(var_d + eps)) and sum_{c != d} C_cd^2 / D.

    The maps of such a pair are matched twice, by feature and by location: every position of map i
    with the nearest one of map j, and every position of map j with the nearest one of map i. The
    invariance is the mean squared difference of what is kept, averaged over the two directions,
    summed over the two ways of matching and averaged over pairs (docs/vicregl.md).

    Args:
        embeddings: one [B, D] a view, the two large views first, B >= 2; float32, bfloat16,
            float16 or float64, any strides. Not read where alpha = 0, and may be None there.
        maps: one feature map a view, [B, H, W, C] or [B, L, C]; views may differ in H and W. The
            embeddings' dtype. Not read where alpha = 1.
        grids: where each position of the maps lies in the image that the views were cut from,
            [B, H, W, 2] or [B, L, 2]: any unit that the views share; float.
        alpha: the share of the embeddings' loss, 0 to 1.
        num_matches: how many of the closest matches are kept from the large view i to j, and from
            j to i; None or -1 keeps all.
        l2_all_matches: keep all matches by feature; else num_matches of those too.
        fast_vc_reg: False: variance and covariance are those of the kept matches, of either side,
            for each place in the list of matches over the batch. True: those of the maps, for each
            position over the batch, averaged over views.
        covariance: with fast_vc_reg, "all_views": the mean over views. "last_view": what the
            published loop leaves, twice the last view's over the number of views.
        match_order: the kept matches' places in their list: "position" (as published), or
            "distance", closest first (lightly; with l2_all_matches=False).
        invariance_weight, variance_weight, covariance_weight: w_i, w_v, w_c.
        margin, eps: target standard deviation, and what is added to the variance under the root.
        process_group: None, or the ranks that hold the batch together: True for the default
            group. The loss is then that of the whole batch, and its gradient is multiplied by the
            number of ranks, which DistributedDataParallel's average takes out.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input.

    Returns:
        A 0-d tensor, float32 (float64 for float64 inputs). No gradient goes through the choice of
        matches, nor to the grids. Fused backends differentiate once; "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is not one of the above; the
            message names the argument.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    settings = dict(
        alpha=alpha,
        num_matches=num_matches,
        l2_all_matches=l2_all_matches,
        fast_vc_reg=fast_vc_reg,
        covariance=covariance,
        match_order=match_order,
        invariance_weight=invariance_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
        margin=margin,
        eps=eps,
    )
    return _terms(embeddings, maps, grids, process_group, backend, settings)[0]


def vicregl_terms(
    embeddings: Sequence[Tensor] | None,
    maps: Sequence[Tensor] | None,
    grids: Sequence[Tensor] | None,
    *,
    process_group: Any = None,
    backend: str | None = None,
    **settings: Any,
) -> VICRegLTerms:
    """Compute `vicregl_loss` and its terms, each differentiable.

    It takes the arguments of `vicregl_loss`. Returns VICRegLTerms(loss, invariance, variance,
    covariance, local_invariance, local_variance, local_covariance): 0-d tensors; the terms are
    unweighted, the first three of the embeddings and the last three of the maps, 0 where alpha
    leaves them out.
    """
    for name in settings:
        if name not in DEFAULTS:
            raise TypeError(f"{name}: vicregl_terms takes {', '.join(DEFAULTS)}")
    settings = {**DEFAULTS, **settings}
    return VICRegLTerms(*_terms(embeddings, maps, grids, process_group, backend, settings))


DEFAULTS: dict[str, Any] = {
    name: value
    for name, value in (vicregl_loss.__kwdefaults__ or {}).items()
    if name not in ("process_group", "backend")
}
