"""Lines of gather_tokens, scatter_tokens, prediction_loss and assemble_tokens."""

from __future__ import annotations

from itertools import accumulate

from tests.fuzz.inputs import Draw


def _index(r: Draw, samples: int, tokens: int, packed: bool, once: bool) -> tuple[str, str, int]:
    """(the index, offsets or nothing, rows of the whole or of a sample)."""
    kept = 0 if tokens == 0 else r.randint(0 if packed or r.chance(0.1) else 1, tokens)

    def one(count: int) -> list[int]:
        if once:
            return r.sample(range(tokens), count)
        return [r.randrange(tokens) for _ in range(count)]

    if not packed:
        return r.integers([one(kept) for _ in range(samples)]), "", kept
    counts = [r.randint(0, kept) for _ in range(max(1, samples))]
    rows = [place for count in counts for place in one(count)]
    offsets = [0, *accumulate(counts)]
    word = repr(offsets) if r.chance(0.3) else r.integers(offsets)
    return r.integers(rows), word, len(rows)


def _rows(samples: int, kept: int, dim: int, packed: bool) -> list[int]:
    return [kept, dim] if packed else [samples, kept, dim]


def gather_tokens(r: Draw) -> str:
    samples, tokens, dim, packed = r.extent(3), r.extent(13), r.extent(), r.chance(0.4)
    index, offsets, _ = _index(r, samples, tokens, packed, False)
    dtype = r.dtype()
    arguments = {"x": r.tensor([samples, tokens, dim], dtype, r.size(dtype)), "index": index}
    if offsets:
        arguments["offsets"] = offsets
    return r.line("gather_tokens", arguments | r.backend())


def scatter_tokens(r: Draw) -> str:
    samples, tokens, dim, packed = r.extent(3), r.extent(13), r.extent(), r.chance(0.4)
    index, offsets, kept = _index(r, samples, tokens, packed, not r.chance(0.1))
    dtype = r.dtype()
    shape = _rows(samples, kept, dim, packed)
    arguments = {"tokens": r.tensor(shape, dtype, r.size(dtype)), "index": index}
    arguments["length"] = repr(tokens)
    if offsets:
        arguments["offsets"] = offsets
    arguments |= r.some(fill=r.one_of(0.0, 1.5, float("-inf"), float("nan")))
    return r.line("scatter_tokens", arguments | r.backend())


def prediction_loss(r: Draw) -> str:
    samples, tokens, dim, packed = r.extent(3), r.extent(13), r.extent(), r.chance(0.4)
    dtype, other, masks = r.dtype(), r.dtype(), r.choice((0, 0, 1, 2, 3))
    if dtype == "float64" or other == "float64" or r.chance(0.5):
        other = dtype
    size = r.size(dtype)
    drawn = [_index(r, samples, tokens, packed, True) for _ in range(max(1, masks))]
    preds = [r.tensor(_rows(samples, n, dim, packed), dtype, size) for *_, n in drawn]
    columns = {"pred": preds, "index": [index for index, *_ in drawn]}
    if packed:
        columns["offsets"] = [offsets for _, offsets, _ in drawn]
    joined = {n: f"[{', '.join(w)}]" if masks else w[0] for n, w in columns.items()}
    size = size if other != "float16" else min(size, 1e3)
    teacher = r.tensor([samples, tokens, dim], other, size, grad=False)
    arguments = {"pred": joined["pred"], "teacher": teacher, "index": joined["index"]}
    arguments |= {"offsets": joined["offsets"]} if packed else {}
    arguments |= r.some(
        kind=r.one_of("smooth_l1", "l1", "mse", "cosine"),
        normalize_target=r.one_of(True, False),
        beta=r.number(1.0, 0.0),
        eps=r.number(1e-5, 0.0),
        reduction=r.one_of("masks", "tokens"),
    )
    return r.line("prediction_loss", arguments | r.backend())


def assemble_tokens(r: Draw) -> str:
    samples, tokens, dim, packed = r.extent(3), r.extent(13), r.extent(), r.chance(0.4)
    dtype = r.dtype()
    same = dtype == "float64" or r.chance(0.7)
    other = dtype if same else r.choice(("float32", "bfloat16"))
    index, offsets, kept = _index(r, samples, tokens, packed, True)
    targets, target_offsets, wanted = _index(r, samples, tokens, packed, True)
    size = r.size("float16" if "float16" in (dtype, other) else dtype)
    one = r.choice(([dim], [1, 1, dim], _rows(samples, wanted, dim, packed)))
    if not packed and r.chance(0.2):
        targets, one = f"[{targets}, {targets}]", [dim]
    arguments = {
        "context": r.tensor(_rows(samples, kept, dim, packed), dtype, size),
        "context_index": index,
        "mask_token": r.tensor(one, other, size),
        "target_index": targets,
    }
    if r.chance(0.5):
        arguments["positions"] = r.tensor([tokens + r.choice((0, 0, 2)), dim], other, size)
    if packed:
        arguments |= {"context_offsets": offsets, "target_offsets": target_offsets}
    return r.line("assemble_tokens", arguments | r.backend())
