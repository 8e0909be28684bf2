"""The public functions of SIGReg."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import distributed
from vicreg_kernels.core import dispatch
from vicreg_kernels.sigreg import reference
from vicreg_kernels.sigreg.checks import MOST, check_call, check_settings, check_step, is_int
from vicreg_kernels.sigreg.contract import Settings
from vicreg_kernels.sigreg.op import Draw, SIGReg, grouped
from vicreg_kernels.sigreg.ranks import OP, agree


def _draw_of(step: int | Tensor | None, seed: int, slices: int) -> Draw:
    if isinstance(step, Tensor):
        return Draw(step, 0, seed, slices)
    return Draw(None, step or 0, seed, slices)


def _drawn(like: Tensor, draw: Draw, dim: int, backend: str) -> Tensor:
    """Directions of like's dtype on its device."""
    step, number, seed, slices = draw
    return torch.ops.vicreg_kernels.sigreg_directions(
        like.detach(), step, number, seed, dim, slices, backend
    )


def sigreg_directions(
    dim: int,
    slices: int,
    *,
    step: int | Tensor | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw the random unit directions of `sigreg_loss`: float32 [dim, slices].

    They come from Philox4x32-10 with the key `seed` and the counter (index, step), and Box-Muller.
    Every rank therefore draws the same directions without communication. Backends differ by one or
    two roundings.

    Args:
        dim, slices: D and M.
        step: the training step, an int or a 0-d int64 tensor on `device`; None is 0.
        seed: a signed 64-bit int.
        device: where; None takes step's, or the default device.
        backend: as in `sigreg_loss`.

    Raises: ValueError, TypeError, RuntimeError as `sigreg_loss` does.
    """
    if not is_int(dim):
        raise TypeError(f"dim: got {type(dim).__name__}, takes an int")
    if not 1 <= dim < MOST:
        raise ValueError(f"dim: got {dim}, takes at least 1 and less than 2^63")
    if slices is None:
        raise TypeError("slices: got None, takes an int")
    check_settings(slices=slices, seed=seed, backend=backend)
    if device is None:
        where = step.device if isinstance(step, Tensor) else torch.get_default_device()
    else:
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
    check_step(step, where)
    name = dispatch.choose("sigreg_directions", backend, where.type, torch.float32)
    like = torch.empty(0, dtype=torch.float32, device=where)
    return _drawn(like, _draw_of(step, seed, slices), dim, name)


def sigreg_loss(
    z: Tensor,
    *,
    slices: int | None = None,
    knots: int | Sequence[float] | None = None,
    t_max: float | None = None,
    convention: str = "lejepa",
    directions: Tensor | None = None,
    step: int | Tensor | None = None,
    seed: int = 0,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Compute SIGReg: how far random projections of z are from a standard normal distribution, by
    the Epps-Pulley test (LeJEPA, Balestriero and LeCun, 2025, arXiv:2511.08544).

    With p = z A on unit directions A and phi_k = exp(-t_k^2 / 2),

        loss = f mean_slices sum_k w_k ((mean_n cos t_k p - phi_k)^2 + (mean_n sin t_k p)^2)

    averaged over groups. w_k is the weight of the trapezoid rule on [-t_max, t_max] times phi_k; f
    is the number of rows N, or 1 with convention="eb_jepa" (docs/sigreg.md has the table).

    Args:
        z: embeddings, [N, D], or grouped [G, N, D] (views [V, N, D], time steps [T, B, D]): the
            mean over groups, except that "stable_pretraining" takes all views as one sample.
            N >= 2; float32, bfloat16, float16 or float64, any strides.
        slices: number M of random directions. None takes the convention's own (1024; "eb_jepa"
            256), as for the next two.
        knots: a number of equally spaced knots on [0, t_max] ("eb_jepa": on [-t_max, t_max]), or a
            list or tuple of the knots themselves, ascending, weighed by the trapezoid rule; at most
            64 distances from 0.
        t_max: the last of equally spaced knots, in the unit of 1 / z.
        convention: "lejepa", "eb_jepa", "lewm", "lightly" or "stable_pretraining": the published
            implementation whose value and gradient to reproduce (the last as it is meant: across
            ranks its published gradient is wrong).
        directions: [D, M] constants on z's device to use as they are, or None: drawn from `seed`
            and `step`, the same on every rank. They are rounded to z's dtype; everything else is
            float32 (float64 for float64).
        step: the training step, so that directions are fresh in every step: an int, or a 0-d int64
            tensor on z's device (for CUDA graphs). None is 0: always the same directions.
        seed: a signed 64-bit int.
        process_group: None, True (the default group) or a torch.distributed.ProcessGroup: the
            statistic of the rows of all its ranks. Every rank gets that loss, and a gradient for
            its own rows that DistributedDataParallel averages to the one of the whole batch.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input.

    Returns:
        A 0-d tensor, float32 (float64 for float64 inputs). The gradient has z's dtype. Fused
        backends differentiate once; "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is not one of the above; the
            message names the argument.
        RuntimeError: the named backend cannot run here, or ranks disagree; the message says why.
    """
    group = None if process_group is None else distributed.group_name(process_group)
    checked, name = distributed.check_on_all_ranks(
        OP,
        group,
        check_call,
        z,
        slices,
        knots,
        t_max,
        convention,
        directions,
        step,
        seed,
        group,
        backend,
    )
    if not torch.compiler.is_compiling():
        dispatch.log_choice("sigreg", name, backend, z.device, z.shape)

    rule = checked.convention
    drawn: list[int] = []
    if directions is None:
        drawn = [seed] if isinstance(step, Tensor) else [seed, step or 0]
    else:
        directions = directions.to(z.dtype)
    settings = Settings(checked.knots, checked.weights, rule.times_rows, drawn, group)
    draw = _draw_of(step, seed, checked.slices)
    if name == "reference":
        if directions is None:
            directions = _drawn(z, draw, z.shape[-1], name)
        return _reference(grouped(z, rule.pooled), directions, settings)
    return SIGReg.apply(z, directions, draw, rule.pooled, name, settings)


def _reference(z: Tensor, directions: Tensor, settings: Settings) -> Tensor:
    rows = z.shape[1]
    reduce: Callable[[Tensor], Tensor] | None = None
    if settings.group is not None:
        among = distributed.by_name(settings.group)
        each = agree(among, z, directions, settings)
        rows = sum(each)

        def reduce(sums: Tensor) -> Tensor:
            """Sum over ranks. The gradient is this rank's, times the number of ranks."""
            whole = distributed.sum_ranks_(OP, among, sums.detach().clone())
            own = len(each) * sums
            return own + (whole - own.detach())

    factor = float(rows) if settings.times_rows else 1.0
    numbers = (settings.knots, settings.weights, float(rows), factor)
    return reference.loss(z, directions, *numbers, reduce)
