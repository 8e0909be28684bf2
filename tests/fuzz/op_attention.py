"""Lines of masked_attention, with its rules and rope, and of apply_rope."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

from tests.fuzz.inputs import Draw


def _lengths(r: Draw, samples: int, longest: int) -> list[int]:
    return [r.randint(0, longest) for _ in range(samples)]


def _spoil(r: Draw, word: str) -> str:
    """A rule's tensor, one in fifteen of them spoiled."""
    return r.spoiled(word) if r.chance(0.07) else word


def _rope(r: Draw, rows: int, tokens: int, keys: int, packed: bool) -> str:
    grid = [r.extent(5) for _ in range(r.choice((1, 2, 3)))]
    grid[0] = -(-max(tokens, keys, 1) // max(1, math.prod(grid[1:]))) + r.choice((0, 0, 1))
    parts = [repr(tuple(grid))]
    places = max(1, math.prod(grid))

    def index(count: int) -> str:
        one = [r.randrange(places) for _ in range(count)]
        return _spoil(r, r.integers(one if packed or r.chance(0.5) else [one] * rows))

    if r.chance(0.5):
        parts.append(f"index={index(tokens)}")
        if keys != tokens or r.chance(0.3):
            parts.append(f"key_index={index(keys)}")
    parts += [f"layout={r.one_of('vjepa2', 'axial')}"] * r.chance(0.5)
    parts += [f"theta={r.number(1e4, 100.0)}"] * r.chance(0.3)
    return f"Rope3d({', '.join(parts)})"


def _padding(r: Draw, samples: int, keys: int) -> str:
    if r.chance(0.5):
        return f"KeyPadding({_spoil(r, r.integers(_lengths(r, samples, keys)))})"
    seen = [[r.chance(0.6) for _ in range(keys)] for _ in range(samples)]
    word = r.integers(seen, "bool")
    return word if r.chance(0.2) else f"KeyPadding({_spoil(r, word)})"


def _blocks(r: Draw, samples: int, longest: int) -> str:
    cuts = sorted(_lengths(r, r.choice((1, 2, 3)), longest))
    context, sizes = cuts[0], [b - a for a, b in pairwise(cuts)]
    if r.chance(0.5):
        return f"Blocks({context}, {_spoil(r, r.integers(sizes))})"
    rows = r.integers([sizes] * samples)
    return f"Blocks({_spoil(r, r.integers([context] * samples))}, {_spoil(r, rows)})"


def _joined(rules: list[str]) -> str:
    """A boolean mask alone stands for KeyPadding of it; `&` takes rules."""
    if len(rules) > 1:
        rules = [f"KeyPadding({rule})" if rule.startswith("I(") else rule for rule in rules]
    return " & ".join(rules) if rules else "None"


def masked_attention(r: Draw) -> str:
    samples, heads, dim = r.extent(3), r.extent(3), r.choice((16, 24, 40, 64, 128))
    packed, dtype = r.chance(0.3), r.dtype()
    dim = r.extent() if r.chance(0.03) else dim
    tokens = r.extent(17)
    keys = tokens if r.chance(0.6) else r.extent(17)
    most = (tokens, keys)
    rules = []
    if packed:
        lengths = [_lengths(r, max(1, samples), n) for n in most]
        own, other = ([0, *accumulate(n)] for n in lengths)
        same = tokens == keys
        offsets = [_spoil(r, r.integers(own))]
        offsets += [] if same else [_spoil(r, r.integers(other))]
        rules.append(f"Ragged({', '.join(offsets)})")
        tokens, keys = own[-1], (own if same else other)[-1]
        most = (max(lengths[0]), max(lengths[0 if same else 1]))
    if r.chance(0.3):
        rules.append(_padding(r, max(1, samples), min(most[1], keys)))
    if r.chance(0.3):
        window = r.choice(("", ", window=1", ", window=2"))
        rules.append(f"FrameCausal({r.choice((1, 2, 5))}{window})")
    if most[0] == most[1] and r.chance(0.3):
        rules.append(_blocks(r, max(1, samples), min(most)))
    shapes = [(n, heads, dim) if packed else (samples, heads, n, dim) for n in (tokens, keys, keys)]
    size = r.size(dtype)
    arguments = {n: r.tensor(s, dtype, size) for n, s in zip("qkv", shapes, strict=True)}
    arguments["mask"] = _joined(rules)
    if r.chance(0.4):
        rows = 1 if packed else samples
        arguments["rope"] = _rope(r, rows, tokens, keys, packed)
    arguments |= r.some(0.2, scale=r.number(0.25, 1.0, 0.0))
    return r.line("masked_attention", arguments | r.backend(), 0.2)


def apply_rope(r: Draw) -> str:
    samples, heads, tokens, dim = r.extent(3), r.extent(3), r.extent(17), r.choice((16, 24, 40, 64))
    packed, dtype = r.chance(0.3), r.dtype()
    arguments = {}
    shape = (tokens, heads, dim) if packed else (samples, heads, tokens, dim)
    arguments["x"] = r.tensor(shape, dtype, r.size(dtype))
    arguments["rope"] = _rope(r, samples, tokens, tokens, packed)
    if packed and r.chance(0.5):
        lengths = _lengths(r, max(1, samples), 9)
        arguments["x"] = r.tensor((sum(lengths), heads, dim), dtype, r.size(dtype))
        arguments["offsets"] = r.integers([0, *accumulate(lengths)])
    return r.line("apply_rope", arguments | r.backend(), 0.25)
