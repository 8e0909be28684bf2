"""What is checked of the arguments of `vicregl_loss`: shapes, dtypes, devices and settings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vicreg_kernels.core import checks as shared
from vicreg_kernels.core import dispatch, reals
from vicreg_kernels.vicregl.reference import Setting

COVARIANCES = ("all_views", "last_view")
ORDERS = ("position", "distance")


def settings(
    *,
    alpha: float,
    num_matches: Sequence[int | None],
    l2_all_matches: bool,
    match_order: str,
    fast_vc_reg: bool,
    covariance: str,
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
    margin: float,
    eps: float,
    backend: str | None,
) -> Setting:
    """The settings as one object; raises a ValueError or TypeError that names the wrong one."""
    eps, margin = reals.finite("eps", eps, 0), reals.margin(margin)
    dispatch.check_backend(backend)
    alpha = reals.real("alpha", alpha, "a number from 0 to 1")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha}, takes a number from 0 to 1")
    if isinstance(num_matches, (str, bytes)) or not isinstance(num_matches, Sequence):
        raise TypeError(f"num_matches: got {type(num_matches).__name__}, takes two numbers")
    if len(num_matches) != 2:
        raise ValueError(f"num_matches: got {len(num_matches)} numbers, takes two")
    counts = [None if count == -1 else count for count in num_matches]
    for count in counts:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise TypeError(f"num_matches: got {count!r}, takes whole numbers, or None for all")
        if count is not None and count < 1:
            raise ValueError(f"num_matches: got {count}, takes at least 1, or None for all")
    if match_order not in ORDERS:
        raise ValueError(f"match_order: got {match_order!r}, takes one of {ORDERS}")
    if covariance not in COVARIANCES:
        raise ValueError(f"covariance: got {covariance!r}, takes one of {COVARIANCES}")
    if covariance == "last_view" and not fast_vc_reg:
        raise ValueError("covariance: got 'last_view', which is a reading of fast_vc_reg=True only")
    weights = (invariance_weight, variance_weight, covariance_weight)
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    numbers = [float(reals.finite(*each)) for each in zip(names, weights, strict=True)]
    return Setting(
        alpha=float(alpha),
        num_matches=(counts[0], counts[1]),
        l2_all_matches=bool(l2_all_matches),
        match_order=match_order,
        fast_vc_reg=bool(fast_vc_reg),
        covariance=covariance,
        weights=(numbers[0], numbers[1], numbers[2]),
        margin=float(margin),
        eps=float(eps),
    )


def _views(name: str, views: Sequence[Tensor] | None, shapes: str, dims: Sequence[int]) -> None:
    """At least two dense float tensors of one batch size, dtype and device."""
    if views is None or isinstance(views, Tensor) or not isinstance(views, Sequence):
        raise TypeError(f"{name}: got {type(views).__name__}, takes a sequence of tensors")
    if len(views) < 2:
        raise ValueError(f"{name}: got {len(views)} views, takes at least 2, the large ones first")
    for i, z in enumerate(views):
        where = f"{name}[{i}]"
        shared.is_tensor(where, z)
        shared.dense_float(where, z.dtype, z.layout)
        if z.dim() not in dims:
            raise ValueError(f"{where}: got shape {tuple(z.shape)}, takes {shapes}")
        shared.not_empty(where, z.shape)
        first = views[0]
        shared.same_dtype(where, z.dtype, first.dtype, "that of view 0,")
        shared.same_device(where, z.device, first.device, "that of view 0,")
        if z.shape[0] != first.shape[0]:
            raise ValueError(
                f"{where}: got a batch of {z.shape[0]}, takes that of view 0, {first.shape[0]}"
            )
        if z.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"{where}: got {z.shape[-1]} in the last dimension, takes that of view 0, "
                f"{first.shape[-1]}"
            )


def _agree(name: str, views: Sequence[Tensor], other: str, others: Sequence[Tensor]) -> None:
    if len(views) != len(others):
        raise ValueError(f"{name}: got {len(views)} views, takes as many as {other}, {len(others)}")
    shared.same_device(name, views[0].device, others[0].device, f"that of {other},")
    if views[0].shape[0] != others[0].shape[0]:
        raise ValueError(
            f"{name}: got a batch of {views[0].shape[0]}, takes that of {other}, "
            f"{others[0].shape[0]}"
        )


def tensors(
    embeddings: Sequence[Tensor] | None,
    maps: Sequence[Tensor] | None,
    grids: Sequence[Tensor] | None,
    setting: Setting,
    rows: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Checked; maps as [B, L, C], grids as [B, L, 2]. What alpha leaves out is an empty list.

    rows: the least batch size.
    """
    read: list[tuple[str, Sequence[Tensor]]] = []
    vectors: list[Tensor] = []
    flat: list[Tensor] = []
    places: list[Tensor] = []
    if setting.alpha > 0:
        _views("embeddings", embeddings, "[B, D]", (2,))
        assert embeddings is not None
        vectors = list(embeddings)
        read.append(("embeddings", vectors))
    if setting.alpha < 1:
        _views("maps", maps, "[B, H, W, C] or [B, L, C]", (3, 4))
        _views("grids", grids, "[B, H, W, 2] or [B, L, 2]", (3, 4))
        assert maps is not None
        assert grids is not None
        if vectors:
            _agree("maps", maps, "embeddings", vectors)
            if maps[0].dtype != vectors[0].dtype:
                raise TypeError(
                    f"maps: got dtype {maps[0].dtype}, takes that of embeddings, {vectors[0].dtype}"
                )
        _agree("grids", grids, "maps", maps)
        read.append(("maps", maps))
        for i, (z, grid) in enumerate(zip(maps, grids, strict=True)):
            if grid.shape[-1] != 2:
                raise ValueError(
                    f"grids[{i}]: got shape {tuple(grid.shape)}, takes [B, H, W, 2] or [B, L, 2]"
                )
            flat.append(z if z.dim() == 3 else z.flatten(1, 2))
            places.append(grid if grid.dim() == 3 else grid.flatten(1, 2))
            if places[i].shape[1] != flat[i].shape[1]:
                raise ValueError(
                    f"grids[{i}]: got {places[i].shape[1]} positions, takes those of maps[{i}], "
                    f"{flat[i].shape[1]}"
                )
        _counts([z.shape[1] for z in flat], setting)
    for name, views in read:
        if views[0].shape[0] < rows:
            raise ValueError(
                f"{name}: got a batch of {views[0].shape[0]}, takes at least {rows} (batch "
                "statistics need two samples)"
            )
    return vectors, flat, places


def _counts(positions: Sequence[int], setting: Setting) -> None:
    """No more matches are kept than the maps they are searched from have positions."""
    searched = (min(positions[:2]), min(positions))
    for count, least in zip(setting.num_matches, searched, strict=True):
        if count is not None and count > least:
            raise ValueError(
                f"num_matches: got {count}, takes at most the {least} positions of the map that "
                "is searched from, or None for all"
            )
