"""Lines of vicregl_loss and vicregl_terms."""

from __future__ import annotations

from tests.fuzz.inputs import Draw


def _views(function: str, r: Draw) -> str:
    views, batch, channels, dtype = r.choice((2, 2, 3, 4)), r.extent(7), r.extent(17), r.dtype()
    dim, size, alpha = r.extent(17), r.size(dtype), r.choice((0.75, 0.5, 0.0, 1.0))
    flat = r.chance(0.5)
    places = [[r.extent(5), r.extent(4)][flat:] for _ in range(views)]

    def each(shapes: list[list[int]], dtype: str, size: float, **settings: bool) -> str:
        layout = r.choice((None, "contiguous"))
        words = [r.tensor(shape, dtype, size, layout=layout, **settings) for shape in shapes]
        return f"[{', '.join(words)}]"

    arguments = {
        "embeddings": each([[batch, dim]] * views, dtype, size),
        "maps": each([[batch, *at, channels] for at in places], dtype, size),
        "grids": each([[batch, *at, 2] for at in places], "float32", 1.0, grad=False),
        "alpha": repr(alpha),
    }
    most = max(1, min(n[0] if flat else n[0] * n[1] for n in places))
    arguments["num_matches"] = repr(tuple(r.choice((1, most, None, -1)) for _ in range(2)))
    arguments |= r.some(
        l2_all_matches=r.one_of(True, False),
        fast_vc_reg=r.one_of(True, False),
        match_order=r.one_of("position", "distance"),
        covariance=r.one_of("all_views", "last_view"),
        margin=r.number(1.0, 0.0),
        eps=r.number(1e-4, 0.0),
        invariance_weight=r.number(25.0, 0.0),
        variance_weight=r.number(25.0, 0.0),
        covariance_weight=r.number(1.0, 0.0),
    )
    return r.line(function, arguments | r.backend())


def vicregl_loss(r: Draw) -> str:
    return _views("vicregl_loss", r)


def vicregl_terms(r: Draw) -> str:
    return _views("vicregl_terms", r)
