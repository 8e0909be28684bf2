"""Which of a run's processes this one is, and which rows of a batch are its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """A rank's rows of a batch: an equal part, in the order of ranks."""

    rank: int = 0
    ranks: int = 1

    def of(self, rows: Any) -> Any:
        size = len(rows) // self.ranks
        return rows[self.rank * size : (self.rank + 1) * size]


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun; alone without it."""

    rank: int = 0
    ranks: int = 1

    @property
    def share(self) -> Share:
        return Share(self.rank, self.ranks)

    @property
    def group(self) -> Any:
        return True if self.ranks > 1 else None
