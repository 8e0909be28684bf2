"""The rank of this process in a run, and its rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """A rank's rows of a batch: equal parts, in the order of ranks."""

    rank: int = 0
    ranks: int = 1

    def of(self, rows: Any) -> Any:
        size = len(rows) // self.ranks
        return rows[self.rank * size : (self.rank + 1) * size]


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of ranks; rank 0 of 1 without torchrun."""

    rank: int = 0
    ranks: int = 1

    @property
    def share(self) -> Share:
        return Share(self.rank, self.ranks)

    @property
    def group(self) -> Any:
        return True if self.ranks > 1 else None
