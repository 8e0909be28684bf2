"""Schemas, fakes, backends, autograd, and the public functions of the SIGReg op.

With z [G, N, D], directions A [D, M], p = z A and K knots t_k, the forward op gives

    loss          float32, 0-d
    coefficients  float32 [G, 2, K, M]   a and b of dp = sum_k a_k cos t_k p + b_k sin t_k p
    projections   float32 [G, N, M]      p

with dp the derivative of the loss by p times the number of ranks, and the backward op turns them
into the gradient dp A^T. Across ranks the forward adds up the 2 G K M sums of cosines and sines,
and the backward exchanges nothing. docs/sigreg.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vicreg_kernels import calls, dispatch, distributed
from vicreg_kernels.sigreg import backends, reference
from vicreg_kernels.sigreg.checks import (
    MOST,
    Settings,
    check_call,
    check_settings,
    check_step,
    is_int,
)

OP = "sigreg_loss"

_LIBRARY = torch.library.Library("vicreg_kernels", "FRAGMENT")
_LIBRARY.define(
    "sigreg_directions(Tensor like, Tensor? step, SymInt number, int seed, SymInt dim,"
    " SymInt slices, str backend) -> Tensor"
)
# drawn: seed and step of the directions, where they are known; only compared among ranks.
_LIBRARY.define(
    "sigreg_forward(Tensor z, Tensor directions, float[] knots, float[] weights, bool times_rows,"
    " SymInt[] drawn, str? group, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "sigreg_backward(Tensor grad, Tensor coefficients, Tensor projections, Tensor directions,"
    " float[] knots, str backend) -> Tensor"
)


@torch.library.impl(_LIBRARY, "sigreg_directions", "CompositeExplicitAutograd")
def _directions(
    like: Tensor, step: Tensor | None, number: int, seed: int, dim: int, slices: int, backend: str
) -> Tensor:
    return backends.directions(backend)(like, step, number, seed, dim, slices)


@torch.library.impl(_LIBRARY, "sigreg_forward", "CompositeExplicitAutograd")
def _forward(
    z: Tensor,
    directions: Tensor,
    knots: Sequence[float],
    weights: Sequence[float],
    times_rows: bool,
    drawn: Sequence[int],
    group: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = backends.load(backend)
    if group is None:
        count = float(z.shape[1])
        return kernels.forward(z, directions, knots, weights, count, count if times_rows else 1.0)
    among = distributed.by_name(group)
    each = _agree(among, z, directions, knots, weights, times_rows, drawn)
    count, ranks = float(sum(each)), float(len(each))
    sums, projections = kernels.sums(z, directions, knots)
    distributed.sum_ranks_(OP, among, sums)
    factor = count if times_rows else 1.0
    return *kernels.statistic(sums, knots, weights, count, factor, ranks), projections


@torch.library.impl(_LIBRARY, "sigreg_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    coefficients: Tensor,
    projections: Tensor,
    directions: Tensor,
    knots: Sequence[float],
    backend: str,
) -> Tensor:
    kernels = backends.load(backend)
    return kernels.gradient(grad, coefficients, projections, directions, knots)


@torch.library.register_fake("vicreg_kernels::sigreg_directions")
def _directions_fake(
    like: Tensor, step: Tensor | None, number: int, seed: int, dim: int, slices: int, backend: str
) -> Tensor:
    return like.new_empty((dim, slices))


@torch.library.register_fake("vicreg_kernels::sigreg_forward")
def _forward_fake(
    z: Tensor, directions: Tensor, knots: Sequence[float], *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    groups, rows, _ = z.shape
    slices = directions.shape[1]

    def new(*shape: Any) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=z.device)

    return new(), new(groups, 2, len(knots), slices), new(groups, rows, slices)


@torch.library.register_fake("vicreg_kernels::sigreg_backward")
def _backward_fake(
    grad: Tensor, coefficients: Tensor, projections: Tensor, directions: Tensor, *settings: Any
) -> Tensor:
    groups, rows, _ = projections.shape
    return directions.new_empty((groups, rows, directions.shape[0]))


_LIBRARY.define("sigreg_sum_ranks(Tensor value, str group) -> Tensor")


@torch.library.impl(_LIBRARY, "sigreg_sum_ranks", "CompositeExplicitAutograd")
def _sum_ranks(value: Tensor, group: str) -> Tensor:
    return distributed.sum_ranks_(OP, distributed.by_name(group), value.clone())


@torch.library.register_fake("vicreg_kernels::sigreg_sum_ranks")
def _sum_ranks_fake(value: Tensor, group: str) -> Tensor:
    return torch.empty_like(value)


def mean_over_ranks(values: Tensor, group: str) -> Tensor:
    """The mean over the values of all ranks; its gradient is times the number of ranks."""
    total = values.sum()
    wide = total.detach().double()
    mine = torch.stack((wide, torch.full_like(wide, values.numel()), torch.ones_like(wide)))
    summed, count, ranks = torch.ops.vicreg_kernels.sigreg_sum_ranks(mine, group).unbind()
    own = (ranks / count).to(total.dtype) * total
    return own + ((summed / count).to(total.dtype) - own.detach())


def _agree(
    group: Any,
    z: Tensor,
    directions: Tensor,
    knots: Sequence[float],
    weights: Sequence[float],
    times_rows: bool,
    drawn: Sequence[int],
) -> list[int]:
    """The rows of each rank, once all are about to compute the same statistic."""
    facts = {
        "z": f"[{z.shape[0]}, N, {z.shape[2]}] {z.dtype}",
        "slices": directions.shape[1],
        "knots": f"{len(knots)} up to {knots[-1]:.6g}",
        "variant": f"weights {sum(weights):.9g}, times rows {times_rows}",
        "seed and step": list(drawn),
    }
    return distributed.agree(group, OP, z.shape[1], facts)


class _SIGReg(torch.autograd.Function):
    """Forward saves what the gradient needs, and z, by which a second derivative is noticed;
    backward is one op call. Once differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        directions: Tensor | None,
        step: Tensor | None,
        draw: tuple[int, int, int],
        pooled: bool,
        settings: tuple[Any, ...],
    ) -> Tensor:
        """directions None: drawn from step and draw = (number, seed, slices)."""
        ops = torch.ops.vicreg_kernels
        direct = calls.direct(z)
        if directions is None:
            run = _directions if direct else ops.sigreg_directions
            number, seed, slices = draw
            directions = run(z, step, number, seed, z.shape[-1], slices, settings[-1])
        run = _forward if direct else ops.sigreg_forward
        loss, coefficients, projections = run(_grouped(z, pooled), directions, *settings)
        ctx.save_for_backward(z, coefficients, projections, directions)
        ctx.settings = (settings[0], settings[-1])
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, *saved = ctx.saved_tensors
        run = _Gradient.apply if torch.is_grad_enabled() else _gradient
        return run(z, grads[0], *saved, *ctx.settings), None, None, None, None, None


def _grouped(z: Tensor, pooled: bool) -> Tensor:
    """z as [G, N, D]."""
    if z.dim() == 2:
        return z.unsqueeze(0)
    return z.reshape(1, -1, z.shape[-1]) if pooled else z


def _gradient(z: Tensor, grad: Tensor, *args: Any) -> Tensor:
    run = _backward if calls.direct(z, grad) else torch.ops.vicreg_kernels.sigreg_backward
    found = run(grad, *args)
    return found if found.shape == z.shape else found.view(z.shape)


class _Gradient(torch.autograd.Function):
    """The backward op under create_graph=True: a second derivative is an error, not a silent 0.

    once_differentiable does not do: autograd.grad can walk past its error node.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return _gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("the fused SIGReg differentiates once; backend='reference' to any order")


def _draw(
    like: Tensor, step: int | Tensor | None, seed: int, dim: int, slices: int, backend: str
) -> Tensor:
    """Directions of like's dtype on its device."""
    tensor, number = (step, 0) if isinstance(step, Tensor) else (None, step or 0)
    return torch.ops.vicreg_kernels.sigreg_directions(
        like.detach(), tensor, number, seed, dim, slices, backend
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
    """The random unit directions that `sigreg_loss` draws: float32 [dim, slices].

    Philox4x32-10 under the key `seed` with the counter (index, step), and Box-Muller; so every rank
    draws the same ones with nothing exchanged. Backends differ by a rounding or two.

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
    return _draw(like, step, seed, dim, slices, name)


def sigreg_loss(
    z: Tensor,
    *,
    slices: int | None = None,
    knots: int | Sequence[float] | None = None,
    t_max: float | None = None,
    variant: str = "lejepa",
    directions: Tensor | None = None,
    step: int | Tensor | None = None,
    seed: int = 0,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """SIGReg: how far random projections of z are from a standard normal, by the Epps-Pulley test
    (LeJEPA, Balestriero and LeCun, 2025, arXiv:2511.08544).

    With p = z A on unit directions A and phi_k = exp(-t_k^2 / 2),

        loss = f mean_slices sum_k w_k ((mean_n cos t_k p - phi_k)^2 + (mean_n sin t_k p)^2)

    and the mean over groups; w is the trapezoid rule on [-t_max, t_max] times phi, f the number of
    rows N, or 1 with variant="eb_jepa" (docs/sigreg.md has the table).

    Args:
        z: embeddings, [N, D], or grouped [G, N, D] (views [V, N, D], time steps [T, B, D]): the
            mean over groups, except that "stable_pretraining" takes all views as one sample.
            N >= 2; float32, bfloat16, float16 or float64, any strides.
        slices: number M of random directions. None takes the variant's own (1024; "eb_jepa" 256),
            as for the next two.
        knots: a number of equally spaced knots on [0, t_max] ("eb_jepa": on [-t_max, t_max]), or a
            list or tuple of the knots themselves, ascending, weighed by the trapezoid rule; at most
            64 distances from 0.
        t_max: the last of equally spaced knots, in the unit of 1 / z.
        variant: "lejepa", "eb_jepa", "lewm", "lightly" or "stable_pretraining": the published
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
    settings, name = distributed.checked(
        OP,
        group,
        check_call,
        z,
        slices,
        knots,
        t_max,
        variant,
        directions,
        step,
        seed,
        group,
        backend,
    )
    if not torch.compiler.is_compiling():
        dispatch.log_choice("sigreg", name, backend, z.device, z.shape)

    rule = settings.variant
    drawn: list[int] = []
    if directions is None:
        drawn = [seed] if isinstance(step, Tensor) else [seed, step or 0]
    else:
        directions = directions.to(z.dtype)
    if name == "reference":
        if directions is None:
            directions = _draw(z, step, seed, z.shape[-1], settings.slices, name)
        return _reference(_grouped(z, rule.pooled), directions, settings, drawn, group)
    tensor, number = (step, 0) if isinstance(step, Tensor) else (None, step or 0)
    draw = (number, seed, settings.slices)
    arguments = (settings.knots, settings.weights, rule.times_rows, drawn, group, name)
    return _SIGReg.apply(z, directions, tensor, draw, rule.pooled, arguments)


def _reference(
    z: Tensor, directions: Tensor, settings: Settings, drawn: list[int], group: str | None
) -> Tensor:
    rule, _, knots, weights = settings
    rows = z.shape[1]
    reduce: Callable[[Tensor], Tensor] | None = None
    if group is not None:
        among = distributed.by_name(group)
        each = _agree(among, z, directions, knots, weights, rule.times_rows, drawn)
        rows = sum(each)

        def reduce(sums: Tensor) -> Tensor:
            """The ranks' sum in value, this rank's times the number of ranks in gradient."""
            whole = distributed.sum_ranks_(OP, among, sums.detach().clone())
            own = len(each) * sums
            return own + (whole - own.detach())

    factor = float(rows) if rule.times_rows else 1.0
    return reference.loss(z, directions, knots, weights, float(rows), factor, reduce)
