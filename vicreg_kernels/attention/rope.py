"""Rotary position from a token's place in a grid, 3-D, 2-D or 1-D: the specification and its table.

The head dim is cut into one part an axis, each of `2 * ((d // axes) // 2)` elements, the rest left
alone. Elements 2i and 2i + 1 of a part are turned as a pair; with x' the pair's other element,

    out[j] = x[j] cos a[j] + s x'[j] sin a[j],      s = -1 for even j, +1 for odd j

and a[j] = position on the axis times a frequency, theta^(-2f / part), f = j // 2 in the right order
("axial"). V-JEPA 2's published code repeats the frequencies end to end, f = j mod (part / 2), so
that the two elements of a pair turn by different angles; its checkpoints need that ("vjepa2").

Cosines and sines depend on an axis position and on j alone, so they are a table of
(frames + height + width) rows in float32, computed in float64; kernels look it up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.attention.masks import rows_and_tokens
from vicreg_kernels.core import dispatch, integers, reals
from vicreg_kernels.core.integers import readable
from vicreg_kernels.core.kept import Kept

LAYOUTS = ("vjepa2", "axial")
# A few kilobytes each as a rule; a rope is made anew for every batch's index.
_TABLES = Kept(entries=1024, nbytes=64 * 2**20)


class RopeArguments(NamedTuple):
    """What the ops take. table: [positions, part, 2] (cosine, sine), the axes' rows end to end;
    q_index, k_index: int32 [B or 1, T], None: a token's place in its sample; grid: the three sizes
    (1 for an axis that is not there), then how many axes are rotated.
    """

    table: Tensor | None
    q_index: Tensor | None
    k_index: Tensor | None
    grid: list[int]


NO_ROPE = RopeArguments(None, None, None, [1, 1, 1, 0])


class Rope3d:
    """Rotary position embedding on a grid of (frames, height, width) tokens.

    Args:
        grid: (frames, height, width); (height, width) or (length,) rotate by two axes or one; at
            most 2^31 - 1 places.
        index: each token's place in the flattened grid, (frame * height + row) * width + column:
            int [T], [B, T], or [total] for packed tokens. None: a token's place in its sample.
        key_index: the keys' places, if they differ from the queries'.
        layout: "vjepa2" for the order of frequencies in V-JEPA 2's checkpoints, "axial" for the one
            under which scores depend only on differences of places.
        theta: the base of the frequencies.

    Places on a CPU are checked against the grid. Places on a device are checked only in debug mode
    (VICREG_KERNELS_DEBUG=1), because the check waits for the device.

    Source: V-JEPA 2 (Assran et al., 2025, arXiv:2506.09985); RoFormer (arXiv:2104.09864).
    """

    def __init__(
        self,
        grid: Sequence[int],
        index: Tensor | None = None,
        key_index: Tensor | None = None,
        *,
        layout: str = "vjepa2",
        theta: float = 10000.0,
    ) -> None:
        if not 1 <= len(grid) <= 3 or any(not isinstance(n, int) or n < 1 for n in grid):
            raise ValueError(f"grid: got {tuple(grid)}, takes one to three ints >= 1")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, takes one of {LAYOUTS}")
        theta = reals.real("theta", theta, "a finite number > 0")
        if not 0 < theta < float("inf"):
            raise ValueError(f"theta: got {theta}, takes a finite number > 0")
        if math.prod(grid) > integers.MOST:
            raise ValueError(f"grid: got {tuple(grid)}, takes at most {integers.MOST} places")
        self.axes = len(grid)
        self.grid = (*(1,) * (3 - len(grid)), *grid)
        self.layout = layout
        self.theta = float(theta)
        self.index = self._checked("index", index)
        self.key_index = self._checked("key_index", key_index)

    @property
    def places(self) -> int:
        """The number of tokens of the whole grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def _checked(self, name: str, index: Tensor | None) -> Tensor | None:
        if index is None:
            return None
        if not isinstance(index, Tensor):
            raise TypeError(f"{name}: got {type(index).__name__}, takes an int tensor or None")
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got dtype {index.dtype}, takes int32 or int64")
        if index.dim() not in (1, 2):
            raise ValueError(f"{name}: got shape {tuple(index.shape)}, takes [T] or [B, T]")
        look = readable(index) or (dispatch.DEBUG and not torch.compiler.is_compiling())
        if look and index.numel():
            least, most = integers.extremes(index)
            if least < 0 or most >= self.places:
                raise ValueError(
                    f"{name}: got places {least} to {most}, takes 0 to {self.places - 1} in a grid "
                    f"of {self.grid}"
                )
        return integers.cut(index)

    def part(self, head_dim: int) -> int:
        """The number of elements of the head dim that one axis rotates."""
        return 2 * (head_dim // self.axes // 2)

    def angles(self, position: Tensor, head_dim: int) -> Tensor:
        """[..., part] of positions [...] on one axis; float64 or float32 as they are."""
        part = self.part(head_dim)
        j = torch.arange(part, device=position.device)
        f = j % (part // 2) if self.layout == "vjepa2" else j // 2
        frequency = self.theta ** (-2.0 * f.to(position.dtype) / part)
        return position[..., None] * frequency

    def table(self, head_dim: int, device: torch.device) -> Tensor:
        """float32 [frames + height + width, part, 2], kept for the next rope like this one."""
        key = (self.grid, self.axes, self.layout, self.theta, head_dim, device)
        return _TABLES.get(key, lambda: self._table(head_dim, device))

    def _table(self, head_dim: int, device: torch.device) -> Tensor:
        rows = torch.cat([torch.arange(n, dtype=torch.float64, device=device) for n in self.grid])
        angles = self.angles(rows, head_dim)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).float()

    def resolve(self, q: Tensor, k: Tensor, longest: tuple[int, int]) -> RopeArguments:
        """For q, k: [B, H, T, d], or packed [total, H, d]; longest: the longest sample of each,
        which must fit the grid where index is None.
        """
        checked: list[Tensor | None] = []
        sides = (("index", self.index, q), ("key_index", self.key_index, k))
        for (name, index, x), most in zip(sides, longest, strict=True):
            if index is None and name == "key_index" and self.index is not None:
                name, index = "index", self.index
            if index is None:
                if most > self.places:
                    raise ValueError(
                        f"grid: got {self.grid}, {self.places} places, takes at least the {most} "
                        "tokens of a sample, or an index"
                    )
                checked.append(None)
                continue
            index = index.unsqueeze(0) if index.dim() == 1 else index
            rows, tokens = rows_and_tokens(x)
            if index.shape[1] != tokens or index.shape[0] not in (1, rows):
                raise ValueError(
                    f"{name}: got shape {tuple(index.shape)}, takes [T] or [B, T] with "
                    f"B = {rows}, T = {tokens}"
                )
            checked.append(integers.onto(name, index, q.device))
        table = self.table(q.shape[-1], q.device)
        return RopeArguments(table, checked[0], checked[1], [*self.grid, self.axes])

    def __repr__(self) -> str:
        return f"Rope3d(grid={self.grid[3 - self.axes :]}, layout={self.layout!r})"
