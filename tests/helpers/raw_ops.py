"""Calls of the raw compiled ops that are wrong in one argument, made from the ops' schemas.

A new op's calls stand beside its tests, in tests/<op>/raw_ops.py: `calls(ops)` and `VALID`, as
here.

Run as a program with the namespace of the ops, "cpu" or "cuda" for the kind of kernels behind it,
and, where it is not the installed library, a library and the op to try. Every case is printed
before it runs, so that a crash names it; a line that begins with "FAIL" is a case that was neither
refused by name nor right. The last line counts the cases.
"""

from __future__ import annotations

import faulthandler
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.raw_changes import FAR, variants

LAID = ("spread", "ones")  # changes of the strides alone

# What may be otherwise: (op, argument) to the kinds of change that make a valid call too, "size"
# and "empty" with the dimension, or without it for all.
VALID = {
    ("vicreg_forward", "y"): {"none"},
    ("vicreg_backward", "grads"): {"rank"},
    ("barlow_backward", "grad"): {"rank"},
    ("sigreg_directions", "like"): {"rank", "empty", "size"},
    ("sigreg_directions", "step"): {"none", "rank"},
    ("sigreg_directions", "number"): {"int"},
    ("sigreg_directions", "seed"): {"int"},
    ("sigreg_sums", "z"): {"size 0", "size 1"},
    ("sigreg_sums", "directions"): {"size 1"},
    ("sigreg_sums", "knots"): {"shorter"},
    ("sigreg_forward", "z"): {"size 0", "size 1"},
    ("sigreg_forward", "directions"): {"size 1"},
    ("sigreg_statistic", "sums"): {"size 0", "size 3"},
    ("sigreg_gradient", "grad"): {"rank"},
    ("sigreg_gradient", "projections"): {"size 1"},
    ("sigreg_gradient", "directions"): {"size 0"},
    ("tokens_gather", "x"): {"size"},
    ("tokens_gather", "index"): {"size 0", "size 1", "empty"},
    ("tokens_scatter", "rows"): {"size 1", "size 2"},
    ("tokens_loss_forward", "teacher"): {"size 0", "size 1"},
    ("tokens_loss_forward", "kind"): {"int 0"},
    ("tokens_loss_backward", "teacher"): {"size 0", "size 1"},
    ("tokens_loss_backward", "kind"): {"int 0"},
    ("tokens_loss_backward", "grad"): {"rank"},
    ("tokens_order", "context_index"): {"size 0", "size 1", "empty 1"},
    ("tokens_order", "target_index"): {"size 1", "empty 1"},
    ("tokens_assemble", "positions"): {"none", "size 0"},
    ("tokens_column_sum", "sequence"): {"size 1", "size 2"},
    ("tokens_column_sum", "rows"): {"size 1", "empty 1"},
    ("vicregl_match", "a"): {"size 0", "size 2"},
    ("vicregl_match", "b"): {"size 0", "size 2"},
    ("vicregl_pairs_backward", "grad"): {"rank"},
    ("attention_forward", "q"): {"empty 2"},
    ("attention_backward", "grad"): {"spread"},
    ("attention_rotate", "x"): {"size 1"},
    ("attention_rotate", "index"): {"none", "size 0"},
    ("attention_rotate", "offsets"): {"none"},
    ("ema_update_", "shadows"): {"none"},
    ("ema_update_", "momentum_tensor"): {"none", "rank", "dtype"},
    ("ema_update_", "step_tensor"): {"none", "rank"},
    ("ema_update_", "seed"): {"int"},
    ("ema_update_", "step"): {"int 0"},
}
for _op in ("attention_forward", "attention_backward"):
    VALID[_op, "lengths"] = VALID[_op, "keep"] = {"none"}
    VALID[_op, "bounds"] = {"none", "size"}
    VALID[_op, "q_index"] = VALID[_op, "k_index"] = {"none", "size 0"}
    VALID[_op, "tokens_per_frame"] = VALID[_op, "window"] = {"int 0", f"int {FAR}"}
    VALID[_op, "max_q"] = VALID[_op, "max_k"] = {"int 0"}  # of packed samples: nothing is known
# op -> what tests/<op>/raw_ops.py holds
BESIDE = {
    path.parent.name: import_module(f"tests.{path.parent.name}.raw_ops")
    for path in sorted(Path(__file__).resolve().parents[1].glob("*/raw_ops.py"))
    if path.parent.name != "helpers"
}
for _module in BESIDE.values():
    VALID |= _module.VALID
NO_TABLE = {"shorter", "longer", "no list", "values of the list"}
# What a message of the kernels themselves calls them, which is what the public function does.
ALSO = {
    "offsets": {"q_offsets", "offsets"}, "key_offsets": {"k_offsets"}, "index": {"q_index"},
    "key_index": {"k_index"}, "sizes": {"bounds"}, "context": {"bounds"},
}  # fmt: skip

# Floats may have any strides, but for what an op itself made.
MADE = {
    "grads", "moments", "squares", "deflated", "index", "centred", "grad", "diagonal", "products",
    "standardised", "saved", "coefficients", "projections", "sums", "lse", "table", "positions",
    "momentum_tensor", "step_tensor", "step",
}  # fmt: skip


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR)


_GENERATOR = torch.Generator().manual_seed(0)
KNOTS, WEIGHTS = [0.5, 1.0, 1.5], [0.1, 0.2, 0.3]


def calls(ops: Any, cuda: bool) -> dict[str, list[Callable[[], list[Any]]]]:
    """Valid arguments of every op: usual ones, and ones with dimensions of one element."""
    settings = (1.0, 1e-4, True, [1.0, 0.5, 0.2], [25.0, 25.0, 1.0])
    twins = (1e-5, 0.0, False, 0.005)

    def vicreg(*shape: int) -> list[Callable[[], list[Any]]]:
        x, y = randn(*shape), randn(*shape)
        return [
            lambda: [x, y, *settings],
            lambda: [
                torch.ones(1), x, y, *ops.vicreg_forward(x, y, *settings)[1:], True, True, *settings
            ],
        ]  # fmt: skip

    def barlow(*shape: int) -> list[Callable[[], list[Any]]]:
        x, y = randn(*shape), randn(*shape)
        return [
            lambda: [x, y, *twins],
            lambda: [
                torch.ones(1), x, y, *ops.barlow_forward(x, y, *twins)[1:], True, True, *twins
            ],
        ]  # fmt: skip

    def sigreg(groups: int, rows: int, dim: int, slices: int) -> list[Callable[[], list[Any]]]:
        z, a = randn(groups, rows, dim), randn(dim, slices)
        sums = randn(groups, 2, 3, slices)
        rest = (float(rows), 1.0)
        return [
            lambda: [z, a, KNOTS],
            lambda: [z, a, KNOTS, WEIGHTS, *rest],
            lambda: [sums, KNOTS, WEIGHTS, *rest, 1.0],
            lambda: [
                torch.ones(1), *ops.sigreg_forward(z, a, KNOTS, WEIGHTS, *rest)[1:], a, KNOTS
            ],
        ]  # fmt: skip

    def rows(batch: int, tokens: int, kept: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.stack([torch.arange(kept) for _ in range(2 * batch)])
        return randn(batch, tokens, dim), index, randn(2 * batch, kept, dim)

    def loss(dense: bool, kind: int, *sizes: int) -> list[Any]:
        x, index, pred = rows(*sizes)
        if dense:
            return [pred, x, index, None, kind, True, 1.0, 1e-5]
        half, own = index[: len(x)].flatten(), pred[: len(x)].flatten(0, 1)
        offsets = torch.arange(len(x) + 1) * index.shape[1]
        return [own, x, half, offsets, kind, True, 1.0, 1e-5]

    def loss_backward(*arguments: Any) -> list[Any]:
        made = loss(*arguments)
        saved = ops.tokens_loss_forward(*made)[1]
        return [torch.ones(()), *made[:4], saved, *made[4:7]]

    def assembly(dim: int, own: bool) -> list[Any]:
        context = torch.tensor([[0, 2], [1, 3]])
        wanted = torch.tensor([[1, 3], [0, 2]]).repeat(2, 1)
        _, context_rows, target_rows = ops.tokens_order(context, wanted, None, None)
        target = randn(4, 2, dim) if own else randn(dim)
        return [
            randn(2, 2, dim), context, context_rows, target, wanted, target_rows, randn(4, dim)
        ]  # fmt: skip

    def pairs(u: int, v: int, batch: int, l1: int, l2: int, dim: int, backward: bool) -> list[Any]:
        a, b = randn(u, batch, l1, dim), randn(v, batch, l2, dim)
        tensors = [a, b, *ops.vicregl_match(a, b)]
        kept = ([1, l1], [0.5, 0.5], [l2], [1.0])
        return [torch.ones(()), *tensors, True, True, *kept] if backward else [*tensors, *kept]

    def int32(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def attention(kind: str, dim: int = 16) -> list[Any]:
        dtype = torch.bfloat16 if cuda else torch.float32
        samples, tokens = (1, 6) if kind in ("packed", "one") else (2, 6)
        heads, tokens = (1, 1) if kind == "one" else (2, tokens)
        q, k, v = (randn(samples, heads, tokens, dim).to(dtype) for _ in range(3))
        rules = [None, None, None, None, None, tokens, tokens, 0, 0]
        rope = [None, None, None, [1, 1, 1, 0]]
        if kind == "packed":
            rules[0], rules[1] = int32(0, 2, 6), int32(0, 3, 6)
        elif kind == "rules":
            rules[2] = int32(4, 6)
            rules[3] = torch.ones(2, tokens, dtype=torch.bool)
            rules[4] = int32([2, 4, 6], [2, 4, 6])
            rules[7], rules[8] = 2, 2
            places = int32(*[list(range(6))] * 2)
            rope = [randn(1 + 2 + 3, 8, 2), places, places.clone(), [1, 2, 3, 2]]
        return [q, k, v, *rules, *rope, 0.25]

    def attention_backward(kind: str) -> list[Any]:
        made = attention(kind)
        out, lse = ops.attention_forward(*made)
        return [torch.ones_like(out), *made[:3], out, lse, *made[3:-1], True, True, True, made[-1]]

    def rotation(packed: bool) -> list[Any]:
        grid, table = [1, 2, 3, 2], randn(6, 8, 2)
        if packed:
            return [randn(1, 2, 6, 16), table, None, int32(0, 2, 6), grid, False]
        return [randn(2, 2, 6, 16), table, int32(*[list(range(6))] * 2), None, grid, True]

    def ema() -> list[Any]:
        lists = [[randn(3, 5), randn(700).bfloat16()] for _ in range(3)]
        return [*lists, torch.tensor(0.5), 0.0, True, 3, torch.tensor(2), 0]

    def scatter(dense: bool, *sizes: int) -> list[Any]:
        own, _, index, offsets, *_ = loss(dense, 0, *sizes)
        return [own, index, offsets, sizes[0], sizes[1], 0.0, True, False]

    def gather(dense: bool, *sizes: int) -> list[Any]:
        _, x, index, offsets, *_ = loss(dense, 0, *sizes)
        return [x, index, offsets]

    usual, ones = (2, 6, 3, 7), (1, 1, 1, 1)
    vicregs = [vicreg(2, 5, 7), vicreg(1, 7, 5), vicreg(1, 5, 1), vicreg(1, 1, 5)]
    barlows = [barlow(5, 7), barlow(7, 5), barlow(5, 1), barlow(1, 5)]
    sigregs = [sigreg(2, 5, 4, 6), sigreg(1, 1, 4, 1), sigreg(1, 5, 1, 6)]
    number, packed_index = torch.tensor(3), torch.tensor([0, 2, 1, 3])
    offsets = torch.tensor([0, 2, 4])
    return {
        "vicreg_forward": [v[0] for v in vicregs],
        "vicreg_backward": [v[1] for v in vicregs],
        "barlow_forward": [b[0] for b in barlows],
        "barlow_backward": [b[1] for b in barlows],
        "sigreg_directions": [lambda: [randn(2), number, 5, 7, 4, 6]],
        "sigreg_sums": [s[0] for s in sigregs],
        "sigreg_forward": [s[1] for s in sigregs],
        "sigreg_statistic": [s[2] for s in sigregs],
        "sigreg_gradient": [s[3] for s in sigregs],
        "tokens_gather": [
            lambda: gather(True, *usual), lambda: gather(False, *usual), lambda: gather(True, *ones)
        ],
        "tokens_scatter": [
            lambda: scatter(True, *usual), lambda: scatter(False, *usual),
            lambda: scatter(True, *ones), lambda: scatter(False, *ones),
        ],
        "tokens_loss_forward": [
            lambda: loss(True, 0, *usual), lambda: loss(False, 3, *usual),
            lambda: loss(True, 1, *ones), lambda: loss(False, 2, 2, 4, 3, 1),
        ],
        "tokens_loss_backward": [
            lambda: loss_backward(True, 0, *usual), lambda: loss_backward(False, 3, *usual),
            lambda: loss_backward(True, 1, *ones), lambda: loss_backward(False, 2, 2, 4, 3, 1),
        ],
        "tokens_order": [
            lambda: [torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1, 3], [0, 2]]), None, None],
            lambda: [packed_index, packed_index, offsets, offsets],
        ],
        "tokens_assemble": [
            lambda: assembly(5, False), lambda: assembly(5, True), lambda: assembly(1, True)
        ],
        "tokens_column_sum": [
            lambda: [randn(2, 4, 5), torch.tensor([[0, 1], [2, 3]])],
            lambda: [randn(1, 4, 1), torch.tensor([[0, 1]])],
        ],
        "vicregl_match": [
            lambda: [randn(2, 3, 4, 9), randn(2, 3, 5, 9)],
            lambda: [randn(1, 2, 4, 1), randn(2, 2, 1, 1)],
        ],
        "vicregl_pairs_forward": [
            lambda: pairs(2, 1, 3, 4, 5, 9, False), lambda: pairs(1, 1, 2, 4, 1, 1, False)
        ],
        "vicregl_pairs_backward": [
            lambda: pairs(2, 1, 3, 4, 5, 9, True), lambda: pairs(1, 1, 2, 4, 1, 1, True)
        ],
        "attention_forward": [
            lambda: attention("rules"), lambda: attention("packed"), lambda: attention("one")
        ],
        "attention_backward": [
            lambda: attention_backward("rules"), lambda: attention_backward("packed"),
            lambda: attention_backward("one"),
        ],
        "attention_rotate": [lambda: rotation(False), lambda: rotation(True)],
        "ema_update_": [ema],
    }  # fmt: skip


def again(values: list[Any]) -> list[Any]:
    """Contiguous copies."""

    def one(z: Any) -> Any:
        if isinstance(z, Tensor):
            return z.clone(memory_format=torch.contiguous_format)
        return [one(y) for y in z] if isinstance(z, list) else z

    return [one(z) for z in values]


def results(op: Any, values: list[Any]) -> list[Tensor]:
    """What the op returns and what it wrote."""
    out = op(*values)
    tensors = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else []
    if op._schema.is_mutable:
        tensors += values[0] + values[2]
    return tensors


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.allclose(x.double(), y.double(), 1e-3, 1e-5, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def valid(op: Any, name: str, what: str, values: list[Any], cuda: bool) -> bool:
    given = dict(zip((a.name for a in op._schema.arguments), values, strict=False))
    known = VALID.get((op._schema.name.split("::")[1], name), set())
    if name == "grid" and given["table"] is None:  # then it is not looked at
        known = NO_TABLE
    if name in ("centred", "standardised") and not cuda:
        known = {"dtype", "size", "empty"}  # nothing is saved there
    if cuda and given.get("context_offsets") is not None and name.endswith("_index"):
        known = {"size", "empty"}  # the values of offsets are clamped on the device
    packed = given.get("q_offsets") is not None or given.get("offsets") is not None
    if cuda and packed and name in ("q", "x", "offsets"):  # theirs too, in attention
        known = known | ({"size 0"} if name == "offsets" else {"size 2", "empty 2"})
    if what in known or what.split()[0] in known or what in ("ones", "values"):
        return True
    first = given[name][0] if isinstance(given[name], list) and given[name] else given[name]
    floats = isinstance(first, Tensor) and first.is_floating_point()
    return what == "spread" and floats and name not in MADE


def named(message: str, arguments: list[Any], name: str, what: str) -> bool:
    """Whether an error names the argument that was changed, or, of sizes, one that it meets."""
    words = set(re.findall(r"\w+", message))
    mentioned = words.union(*(names for word, names in ALSO.items() if word in words))
    alone = what in ("rank", "dtype", "number")
    return bool(mentioned & ({name} if alone else {argument.name for argument in arguments}))


def attempt(op: Any, values: list[Any], i: int, what: str, cuda: bool) -> str | None:
    """What is wrong with the op's answer, or None."""
    name, writes = op._schema.arguments[i].name, op._schema.is_mutable
    try:
        first = results(op, again(values) if writes and what not in LAID else values)
    except (RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0]
        if what == "ones":
            return f"refused: {message}"
        if named(message, op._schema.arguments, name, what):
            return None
        return f"does not name it: {message}"
    if not valid(op, name, what, values, cuda):
        return "accepted"
    if what not in LAID or writes:
        return None
    return None if same(first, results(op, again(values))) else "another value than if contiguous"


def main(namespace: str, kind: str, library: str = "", only: str = "") -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    if library:
        torch.ops.load_library(library)
    else:
        import vicreg_kernels  # noqa: F401
    ops = getattr(torch.ops, namespace)
    count = 0
    every = calls(ops, kind == "cuda")
    for name, module in BESIDE.items():
        if name.startswith(only.rstrip("_")):
            every |= module.calls(ops)
    for short, makers in every.items():
        if not short.startswith(only):
            continue
        op = getattr(ops, short).default
        for make in makers:
            base = make()
            results(op, again(base))
            for i, value in enumerate(base):
                argument = op._schema.arguments[i]
                for what, other in variants(argument, value):
                    print(f"{short}.{argument.name} {what}", flush=True)
                    count += 1
                    values = [*base[:i], other, *base[i + 1 :]]
                    wrong = attempt(op, values, i, what, kind == "cuda")
                    if wrong is not None:
                        shape = tuple(other.shape) if isinstance(other, Tensor) else other
                        print(f"FAIL {short}.{argument.name} {what} {shape}: {wrong}", flush=True)
    print(f"{count} cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
