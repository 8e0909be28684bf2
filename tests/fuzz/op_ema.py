"""Lines of ema_update_."""

from __future__ import annotations

from tests.fuzz.inputs import Draw


def ema_update_(r: Draw) -> str:
    shapes = [
        [r.extent() for _ in range(r.choice((0, 1, 2, 3)))] for _ in range(r.choice((0, 1, 2, 5)))
    ]
    one = r.dtype()

    def each(word: str) -> str:
        words = []
        for shape in shapes:
            dtype = one if r.chance(0.7) else r.dtype()
            layout = None if word == "T" or r.chance(0.1) else r.choice(("contiguous", "strided"))
            size = r.size(dtype) if word == "T" else 1.0
            words.append(r.tensor(shape, dtype, size, word=word, layout=layout, grad=r.chance(0.2)))
        return f"[{', '.join(words)}]"

    arguments = {"targets": each("W"), "onlines": each("T")}
    arguments["momentum"] = r.choice(
        (r.one_of(0.996, 0.5, 0.25, 0.0, 1.0), "torch.tensor(0.9)", "torch.tensor(0.1).double()")
    )
    if r.chance(0.3):
        arguments["shadows"] = each("W")
    if r.chance(0.3):
        arguments |= {"rounding": "'stochastic'", "step": r.choice(("0", "3", "2**47", "I(5)"))}
        arguments |= r.some(seed=r.one_of(0, 1, 2**62))
    return r.line("ema_update_", arguments | r.backend())
