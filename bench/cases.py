"""The shapes that are measured, what they must move and do at least, and the ratios to reach."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Two views of `groups` sets of embeddings [rows, dim]; groups = 0: not grouped."""

    rows: int
    dim: int
    groups: int = 0
    gpu_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.groups}x" * bool(self.groups) + f"{self.rows}x{self.dim}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups,) * bool(self.groups) + (self.rows, self.dim)

    def elements(self) -> int:
        """Of one view."""
        return max(self.groups, 1) * self.rows * self.dim

    def least_bytes(self, itemsize: int) -> int:
        """Both views read once, both gradients written once."""
        return 4 * self.elements() * itemsize

    def least_operations(self) -> int:
        """Half of a symmetric product forward, a product backward, on the smaller side."""
        side = min(self.rows, self.dim)
        return 2 * self.elements() * (side + 1 + 2 * side)


# Most important first: a run that is cut short has measured what it was run for.
CASES = {
    case.name: case
    for case in (
        Case(256, 8192),
        Case(2048, 8192, gpu_only=True),
        Case(256, 2048),
        Case(1024, 2048),
        Case(2048, 512),
        Case(64, 8192),
        Case(6528, 512),
        Case(512, 8192),
        Case(16384, 384),
        Case(512, 512, groups=49),
    )
}

QUICK = ("256x2048", "1024x2048", "2048x512", "6528x512", "64x8192")

# Least ratio of a baseline's time to ours, forward and backward: on the CPU for float32 on two
# cores, on the GPU for an H100, float32 and bfloat16.
TARGETS: dict[str, dict[str, dict[str, float]]] = {
    "cpu": {
        "64x8192": {"eager": 500, "gram_plain": 1.25},
        "256x8192": {"eager": 110, "gram_plain": 1.25},
        "256x2048": {"eager": 20, "gram_plain": 1.25},
        "1024x2048": {"eager": 4.5, "gram_plain": 1.25},
        "2048x512": {"eager": 2.3, "gram_plain": 1.25},
        "6528x512": {"eager": 1.9, "gram_plain": 1.25},
    },
    "cuda": {
        **{name: {"gram_best": 1.3} for name in CASES},
        "256x8192": {"eager": 60, "compiled": 15, "gram_best": 1.3},
        "2048x8192": {"eager": 4, "gram_best": 1.3},
    },
}
# On the GPU, ours against its floor.
FLOOR_FACTOR = 2.5
