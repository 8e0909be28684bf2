"""What the drop-in modules have in common: ranks, dtypes, the names in errors, SIGReg's draws."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vicreg_kernels import distributed
from vicreg_kernels.sigreg import sigreg_loss
from vicreg_kernels.sigreg.checks import check_z


def ranks(gathers: bool = True) -> bool | None:
    """Return the `process_group` for a peer that gathers: the default group, if there is one."""
    return True if gathers and dist.is_available() and dist.is_initialized() else None


def checked(op: str, process_group: bool | None, check: Callable[..., None], *args: Any) -> None:
    """Call check(*args). If it raises, the other ranks are told and raise too."""
    group = None if process_group is None else distributed.group_name(process_group)
    distributed.check_on_all_ranks(op, group, check, *args)


def rounded(loss: Tensor, like: Tensor) -> Tensor:
    """Round the loss to the dtype that a peer's plain PyTorch returns, the input's. Under autocast
    it stays float32.
    """
    if torch.is_autocast_enabled(like.device.type):
        return loss
    return loss.to(like.dtype)


def mean_square(difference: Tensor) -> Tensor:
    """Compute the mean square, in float32 for half inputs."""
    return difference.to(torch.promote_types(difference.dtype, torch.float32)).square().mean()


class renamed:
    """A context in which errors of this library name the peer's arguments in place of its own."""

    def __init__(self, **names: str) -> None:
        self.names = names

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind not in (ValueError, TypeError):
            return
        place, colon, text = str(error).partition(": ")
        name, bracket, index = place.partition("[")
        if colon and name in self.names:
            for own, peers in self.names.items():
                text = re.sub(rf"\b{own}(\[\d+\])?'s\b", rf"{peers}\1's", text)
            raise kind(f"{self.names[name]}{bracket}{index}: {text}") from None


def grouped(z: Tensor) -> Tensor:
    """[..., N, D] as `sigreg_loss` takes it, checked before directions of its dtype are drawn."""
    if isinstance(z, Tensor) and z.dim() > 3:
        z = z.flatten(0, -3)
    check_z(z, least_rows=1)
    return z


def unit_columns(
    dim: int,
    slices: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> Tensor:
    """SIGReg's directions [dim, slices] as the peers draw them, from torch's generator: the same
    seed gives the same directions as theirs, and leaves the generator in the same state.
    """
    columns = torch.randn(dim, slices, device=device, dtype=dtype, generator=generator)
    return columns / columns.norm(p=2, dim=0)


def register_quadrature(module: nn.Module, knots: int, t_max: float) -> None:
    """The buffers that the peers' SIGReg modules keep: t, phi = exp(-t^2 / 2) and weights, [knots].
    They are in the state dict, which loads in both directions; the ops have numbers of their own.
    """
    t = torch.linspace(0, t_max, knots, dtype=torch.float32)
    phi = torch.exp(-0.5 * t.square())
    ends = torch.ones(knots)
    ends[1:-1] = 2.0
    module.register_buffer("t", t)
    module.register_buffer("phi", phi)
    module.register_buffer("weights", t_max / (knots - 1) * ends * phi)


class LeWMSIGReg(nn.Module):
    """`vicreg_kernels.sigreg_loss` as LeWM's SIGReg is called by pyjepa and by stable-worldmodel,
    with their directions and state.

    The directions are drawn from torch's generator, as theirs are. Under torch.distributed the
    statistic is that of this rank's rows, as there.

    Args:
        knots: equally spaced knots on [0, 3].
        num_proj: number of random directions.

    Shapes: proj: [T, B, D], a statistic a time step, or [B, D]; B >= 2 -> scalar, float32 (float64
    for float64).
    """

    drawn: torch.dtype | None = None  # the dtype that directions are drawn in; None: proj's

    def __init__(self, knots: int = 17, num_proj: int = 1024) -> None:
        super().__init__()
        self.knots = knots
        self.num_proj = num_proj
        register_quadrature(self, knots, 3.0)

    def forward(self, proj: Tensor) -> Tensor:
        with renamed(z="proj"):
            z = grouped(proj)
            dtype = z.dtype if self.drawn is None else self.drawn
            directions = unit_columns(z.shape[-1], self.num_proj, z.device, dtype)
            return sigreg_loss(z, knots=self.knots, convention="lewm", directions=directions)
