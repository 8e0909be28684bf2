"""The words of a call's line: T, W and I make tensors; Draw chooses what stands in the line."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EXTENTS = (1, 2, 2, 3, 3, 5, 7, 8, 11, 13, 17, 31)
DTYPES = ("float32", "float32", "float32", "bfloat16", "float16")
LAYOUTS = ("contiguous", "sliced", "strided", "transposed", "expanded")
# Half inputs too are computed in float32.
EPS = torch.finfo(torch.float32).eps
FILLS = ("nan", "inf", "constant", "offset")


class Inputs:
    """The tensors of one evaluation of a line.

    wide: T makes float64 tensors of the same values. nudge: a function of (values, eps) that moves
    the values by a rounding. In that case W and I are as they are.
    """

    def __init__(self, wide: bool = False, nudge: Callable[..., Tensor] | None = None) -> None:
        self.wide, self.nudge = wide, nudge
        self.leaves: list[Tensor] = []
        self.written: list[Tensor] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def tensor(
        self,
        shape: Sequence[int],
        dtype: str = "float32",
        layout: str = "contiguous",
        size: float = 1.0,
        seed: int = 0,
        fill: str = "",
        grad: bool = True,
    ) -> Tensor:
        """T: a leaf of normal numbers times `size`, or with one NaN or infinity, all of one value,
        or far from 0, as `fill` says.
        """
        z = self._held(_drawn(shape, dtype, size, seed, fill), layout)
        z.requires_grad_(grad)
        self.leaves.append(z)
        return z

    def output(self, shape: Sequence[int], dtype: str = "float32", *rest: Any) -> Tensor:
        """W: as T, for an op to write into; no gradient."""
        values = _drawn(shape, dtype, 1.0, *rest[1:])
        if self.wide:
            values = values.double()
        z, _ = lay(values, rest[0] if rest else "contiguous")
        self.written.append(z)
        return z

    def integers(self, values: Any, dtype: str = "int64") -> Tensor:
        """I: integers, or booleans, as they stand in the line."""
        z = torch.tensor(values, dtype=getattr(torch, dtype))
        self.before.append((z, z.clone()))
        return z

    def _held(self, values: Tensor, layout: str) -> Tensor:
        if self.nudge is not None:
            values = self.nudge(values.double(), EPS)
        elif self.wide:
            values = values.double()
        z, base = lay(values, layout)
        self.before.append((base, base.clone()))
        return z.detach()

    def changed(self) -> bool:
        """Whether a bit of what was only to be read is another now."""
        return any(not torch.equal(bits(now), bits(then)) for now, then in self.before)


def bits(z: Tensor) -> Tensor:
    """The bytes of the elements, in order."""
    flat = torch.zeros(z.numel(), dtype=z.dtype).copy_(z.detach().reshape(-1))
    return flat.view(torch.uint8)


def _drawn(
    shape: Sequence[int], dtype: str, size: float = 1.0, seed: int = 0, fill: str = ""
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), dtype=torch.float64, generator=generator) * size
    if fill == "constant":
        values = torch.full_like(values, size)
    elif fill == "offset":
        values = values + 100.0 * size
    elif fill and values.numel():
        values.view(-1)[seed % values.numel()] = float(fill)
    return values.to(getattr(torch, dtype))


def lay(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(the values, lying in memory as `layout` says, the memory they lie in)."""
    if values.dim() == 0 or layout == "contiguous":
        return values, values
    if layout == "expanded":  # along the first dimension all the same memory
        base = values[:1].clone()
        return (base.expand(values.shape), base) if values.shape[0] else (values, values)
    if layout == "transposed":
        base = values.transpose(0, -1).contiguous()
        return base.transpose(0, -1), base
    if layout == "sliced":  # rows that start at no aligned address
        base = torch.cat([values.new_zeros(*values.shape[:-1], 3), values], -1)
        return base[..., 3:], base
    base = torch.stack([values, values], -1).flatten(-2)
    return base[..., ::2], base


# What may stand in place of an argument; {} is its expression.
BAD_TENSORS = (
    "None", "'a'", "3", "[{}]", "({}).long()", "({}) > 0", "({}).to(torch.complex64)",
    "({}).double()", "({})[:0]", "({})[..., :0]", "({})[None]", "({})[..., :-1]", "({})[:-1]",
    "({})[0]", "({}).sum()", "({}).detach().to_sparse()", "({}).to('meta')",
)  # fmt: skip
BAD_INTEGERS = (
    "None", "'a'", "3", "({}).float()", "({}) + 1000", "({}) - 1000", "({}).long() + 2**32",
    "({})[:-1]", "({})[None]", "({})[..., :0]", "({}).flip(0)", "({}).to('meta')",
)  # fmt: skip
BAD_LISTS = (
    "None", "'a'", "{}[:-1]", "{}[:1]", "[]", "[*{}, *{}]", "(1, 2)", "{}[0]", "[None]",
)  # fmt: skip
BAD_SETTINGS = (
    "-1", "-0.5", "nan", "inf", "'a'", "[1.0]", "torch.tensor(1.0)", "1j", "2**70", "0", "0.0",
    "b''",
)  # fmt: skip


class Draw(random.Random):
    """Choices for one line."""

    def chance(self, share: float) -> bool:
        return self.random() < share

    def extent(self, most: int = 31, least: int = 1) -> int:
        """A size of a dimension; 0 now and then, whatever `least` is."""
        if self.chance(0.01):
            return 0
        return self.choice([n for n in EXTENTS if least <= n <= most])

    def layout(self) -> str:
        return "contiguous" if self.chance(0.4) else self.choice(LAYOUTS[1:])

    def size(self, dtype: str, large: float = 30.0) -> float:
        """A magnitude: mostly 1, else 1e-30 to 1e30; of what the dtype holds."""
        if self.chance(0.7):
            return 1.0
        largest = min(large, 3.0 if dtype == "float16" else 30.0)
        least = -4.0 if dtype == "float16" else -30.0
        return float(f"{10 ** self.uniform(least, largest):.1e}")

    def dtype(self) -> str:
        return "float64" if self.chance(0.03) else self.choice(DTYPES)

    def fill(self) -> str:
        return self.choice(FILLS) if self.chance(0.15) else ""

    def tensor(
        self,
        shape: Sequence[int],
        dtype: str,
        size: float = 1.0,
        *,
        word: str = "T",
        fill: str | None = None,
        layout: str | None = None,
        grad: bool | None = None,
    ) -> str:
        """The line's word for a float tensor."""
        fill = self.fill() if fill is None else fill
        layout = self.layout() if layout is None else layout
        parts = [repr(tuple(shape)), repr(dtype), repr(layout)]
        if word == "W":
            return f"W({', '.join(parts)}, {self.randrange(1000)}, {fill!r})"
        grad = self.chance(0.8) if grad is None else grad
        return f"T({', '.join(parts)}, {size!r}, {self.randrange(1000)}, {fill!r}, {grad})"

    def integers(self, values: Any, dtype: str | None = None) -> str:
        dtype = dtype or self.choice(("int64", "int64", "int32"))
        return f"I({values!r}, {dtype!r})"

    def one_of(self, *values: Any) -> str:
        return repr(self.choice(values))

    def number(self, *usual: float) -> str:
        """A setting's usual values, or any."""
        if self.chance(0.7):
            return repr(self.choice(usual))
        return repr(float(f"{10 ** self.uniform(-6, 3):.2e}"))

    def some(self, share: float = 0.4, **settings: str) -> dict[str, str]:
        """Each of the settings with this chance."""
        return {name: value for name, value in settings.items() if self.chance(share)}

    def backend(self) -> dict[str, str]:
        return {"backend": self.choice(("'cpu'", "'cpu'", "'cpu'", "None", "'reference'"))}

    def line(self, function: str, arguments: dict[str, str], bad: float = 0.3) -> str:
        """The call; with the chance `bad` one argument is spoiled."""
        if self.chance(bad):
            name = self.choice(list(arguments))
            arguments = {**arguments, name: self.spoiled(arguments[name])}
        return f"{function}({', '.join(f'{k}={v}' for k, v in arguments.items())})"

    def spoiled(self, expression: str) -> str:
        if expression.startswith(("T(", "W(")):
            words: Sequence[str] = BAD_TENSORS
        elif expression.startswith("I("):
            words = BAD_INTEGERS
        elif expression.startswith("["):
            words = BAD_LISTS
        else:
            words = BAD_SETTINGS
        return self.choice(words).replace("{}", expression)
