"""Maps, layouts and the checks of VICRegL's matches and pairs that the GPU kernels' tiers share.

A search is held to the float64 reference, to the last index but where two distances are within
float32's rounding of each other. Pairs are held to the rule of tolerances.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.tolerances import FEWEST_ROUNDINGS, assert_close_to_truth, differentiate
from vicreg_kernels.vicregl import contract, op, reference
from vicreg_kernels.vicregl.op import Kept, Matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _contiguous(z: Tensor) -> Tensor:
    return z.contiguous()


def _channels_first(z: Tensor) -> Tensor:
    """As a convolution leaves a map."""
    return z.mT.contiguous().mT


def _sliced(z: Tensor) -> Tensor:
    """Rows that begin at no aligned address."""
    return torch.cat([z.new_zeros(*z.shape[:-1], 3), z], -1)[..., 3:]


def _strided(z: Tensor) -> Tensor:
    return torch.stack([z, z], -1).flatten(-2)[..., ::2]


def _batch_first(z: Tensor) -> Tensor:
    return z.transpose(0, 1).contiguous().transpose(0, 1)


def _expanded(z: Tensor) -> Tensor:
    """Every view the same memory."""
    return z[:1].expand_as(z)


LAYOUTS = {
    f.__name__[1:]: f
    for f in (_contiguous, _channels_first, _sliced, _strided, _batch_first, _expanded)
}


def draw(*shape, dtype=torch.float32, device="cpu", layout="contiguous", grad=True) -> Tensor:
    z = LAYOUTS[layout](torch.randn(*shape).to(device, dtype))
    return z.requires_grad_(grad)


def maps(shape: tuple[int, ...], **where: object) -> tuple[Tensor, Tensor]:
    """a [U, B, L1, C] and b [V, B, L2, C] of (U, V, B, L1, L2, C)."""
    views_a, views_b, batch, rows_a, rows_b, dim = shape
    return draw(views_a, batch, rows_a, dim, **where), draw(views_b, batch, rows_b, dim, **where)


def same(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.dtype == expected.dtype, name
    assert torch.equal(actual, expected), f"{name}: {actual} is not {expected}"


def rules(length: int) -> tuple[Kept, ...]:
    """No set, one, and as many as there may be, for a map of `length` positions."""
    several = [min(length, count) for count in (4, 1, length, 20)]
    assert len(several) == contract.MOST_COUNTS
    return Kept([], []), Kept([length], [0.7]), Kept(several, [0.5, -1.25, 0.3, 2.0])


SETS = ((2, 2), (1, 0), (0, 2))


def check_match(backend: str, a: Tensor, b: Tensor, exact: bool = False) -> Matches:
    """exact: no distance is rounded, so that every index must be the reference's."""
    a, b = a.detach(), b.detach()
    matches, expected = op.match(a, b, backend), reference.match(a.double(), b.double())
    truths = [
        torch.cdist(one, b.double(), compute_mode="donot_use_mm_for_euclid_dist")
        for one in a.double()
    ]
    squares = torch.stack(truths).square()  # [U, V, B, L1, L2]
    for side, distances in ((0, squares), (2, squares.mT)):
        for i, name in ((side, "nearest"), (side + 1, "rank")):
            assert matches[i].shape == expected[i].shape
            assert matches[i].dtype == torch.int32
            assert matches[i].is_contiguous()
            if exact:
                same(matches[i], expected[i], name)
        rounding = torch.finfo(torch.float32).eps * max(FEWEST_ROUNDINGS, a.shape[-1]) ** 0.5
        nearest, rank = (z.long() for z in matches[side : side + 2])
        least = distances.amin(-1)
        taken = distances.gather(-1, nearest[..., None])[..., 0]
        assert (taken <= least * (1 + rounding)).all(), "not the nearest"
        places = torch.arange(rank.shape[-1], device=rank.device)
        assert torch.equal(rank.sort(-1).values, places.expand_as(rank)), "ranks twice"
        placed = least.sort(-1).values.gather(-1, rank)
        assert ((placed - least).abs() <= least * rounding).all(), "not its rank"
    return matches


def check_pairs(backend: str, a: Tensor, b: Tensor, matches: Matches, *kept: Kept) -> None:
    """Value and gradients of the maps that want one; two runs bitwise equal."""

    def run(name: str, a: Tensor, b: Tensor):
        def function(a: Tensor, b: Tensor) -> Tensor:
            return op.pairs(a, b, matches, *kept, name)

        return differentiate(function, a, b, cotangents=(-1.5,))

    mine, again, plain = run(backend, a, b), run(backend, a, b), run("reference", a, b)
    wide = [z.detach().double().requires_grad_(z.requires_grad) for z in (a, b)]
    truth = run("reference", *wide)
    assert mine.values[0].dtype == torch.float32
    same(again.values[0], mine.values[0], "two runs")
    # The value is a sum over all pairs; weights of both signs may cancel.
    size = sum(abs(weight) for one in kept for weight in one.weights)
    floor = 4 * torch.finfo(torch.float32).eps * size * a.shape[0] * b.shape[0]
    length = max(FEWEST_ROUNDINGS, a.shape[-1])
    values = (outcome.values[0] for outcome in (mine, truth, plain))
    assert_close_to_truth(*values, torch.float32, length, "value", floor)
    gradients = (outcome.gradients for outcome in (mine, again, truth, plain))
    for name, z, found_, repeat, true, formula in zip("ab", (a, b), *gradients, strict=True):
        if not z.requires_grad:
            assert found_ is None
            continue
        assert found_.dtype == z.dtype
        same(repeat, found_, "two runs")
        if true.count_nonzero() == 0:
            assert found_.count_nonzero() == 0
            continue
        rounds = max(FEWEST_ROUNDINGS, a.shape[2] + b.shape[2])
        assert_close_to_truth(found_, true, formula, z.dtype, rounds, f"gradient of {name}")


def check(backend: str, a: Tensor, b: Tensor, sets: tuple[tuple[int, int], ...] = SETS) -> None:
    """Both ops; sets: which of a's and of b's `rules` are kept."""
    matches = check_match(backend, a, b)
    of_a, of_b = rules(a.shape[2]), rules(b.shape[2])
    for i, j in sets:
        check_pairs(backend, a, b, matches, of_a[i], of_b[j])


def grid(height: int, width: int, step: float = 1.0) -> Tensor:
    """[1, 1, H W, 2]: a map's positions, most at equal distances from others."""
    rows, columns = torch.arange(height) * step, torch.arange(width) * step
    return torch.cartesian_prod(rows, columns)[None, None].contiguous()


def check_ties(backend: str, device: str = "cpu", dtypes=DTYPES) -> None:
    """Grids, equal positions, and values of three kinds: the lowest index wins, twice."""
    repeated = torch.ones(2, 1, 9, 5)
    few = torch.randint(-1, 2, (2, 2, 40, 3)).float()
    pairs = (grid(4, 4), grid(3, 3, 0.5)), (grid(7, 7), grid(5, 8)), (repeated, repeated)
    for a, b in (*pairs, (few, few.flip(2)[:1, :, :17])):
        for dtype in dtypes:
            check_match(backend, a.to(device, dtype), b.to(device, dtype), exact=True)


def check_close_positions(backend: str, device: str = "cpu") -> None:
    """Positions a thousandth of their size apart: |a|^2 + |b|^2 - 2 a.b finds other matches."""
    a = 4096 + torch.randn(1, 2, 20, 40).mul(16).round().div(16)
    b = a[:, :, torch.randperm(20)] + torch.randn(1, 2, 20, 40).mul(8).round().div(16)
    matches = check_match(backend, a.to(device), b.to(device), exact=True)
    products = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").argmin(-1)
    assert not torch.equal(matches.nearest_a[0, 0].cpu().long(), products[0])


def check_not_finite(backend: str, device: str = "cpu", views: int = 2) -> None:
    """What cannot be told apart comes last, lowest index first; pairs pass NaN and inf on."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        a, b = (z.to(device) for z in maps((1, views, 2, 7, 5, 9), grad=False))
        a[0, 0, 3, 2] = bad
        b[:, 0, 0, 2] = bad  # inf - inf in front of inf - number
        b[-1, 1, 4, 8] = bad
        a[0, 1, :, 0] = bad
        matches = op.match(a, b, backend)
        for mine, theirs in zip(matches, reference.match(a, b), strict=True):
            same(mine, theirs, str(bad))
        both = rules(7)[2], rules(5)[2]
        leaves = [z.requires_grad_() for z in (a, b)]
        for name in (backend, "reference"):
            loss = op.pairs(a, b, matches, *both, name)
            outcome = loss, *torch.autograd.grad(loss, leaves)
            if name == backend:
                mine = outcome
        for one, other in zip(mine, outcome, strict=True):
            assert torch.equal(one.isnan(), other.isnan()), bad
            assert torch.equal(one.isinf(), other.isinf()), bad
        few = Kept([2], [1.0])  # what is not kept is not read
        leaves = [z.detach()[:, :1].clone().requires_grad_() for z in (a, b)]
        matches = Matches(*(z[:, :, :1].contiguous() for z in matches))
        loss = op.pairs(*leaves, matches, few, few, backend)
        assert all(z.isfinite().all() for z in (loss, *torch.autograd.grad(loss, leaves)))


def check_out_of_range(kernels: contract.Kernels, bad: int, device: str = "cpu") -> None:
    """An index out of range is not followed: NaN in the value and in its position's gradient."""
    a, b = (z.to(device) for z in maps((1, 1, 2, 6, 5, 8), grad=False))
    matches = kernels.match(a, b)
    settings = [6], [1.0], [5], [1.0]
    grad = torch.ones((), device=device)
    good = kernels.pairs_backward(grad, a, b, *matches, True, True, *settings)
    broken = [z.clone() for z in matches]
    broken[0][0, 0, 1, 2] = bad
    assert kernels.pairs_forward(a, b, *broken, *settings).isnan()
    grad_a, grad_b = kernels.pairs_backward(grad, a, b, *broken, True, True, *settings)
    assert grad_a[0, 1, 2].isnan().all()
    grad_a[0, 1, 2] = good[0][0, 1, 2]
    same(grad_a, good[0], "gradient of a")
    # b's position that it named has one match less, all others are as they were
    named = int(matches[0][0, 0, 1, 2])
    assert grad_b.isfinite().all()
    grad_b[0, 1, named] = good[1][0, 1, named]
    same(grad_b, good[1], "gradient of b")
