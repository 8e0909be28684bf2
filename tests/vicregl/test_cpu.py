"""Tier 2: the fused backends against the float64 reference, op by op and whole.

Written for the C++ CPU kernels and run on every fused backend the machine has: the `gpu` marked
cases are the same tests on CUDA tensors.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.recorded_ops import RecordedOps, words
from tests.helpers.tolerances import FEWEST_ROUNDINGS, assert_close_to_truth, value_dtype
from tests.vicregl.cases import VIEWS, WAYS, draw, outcome
from vicreg_kernels.vicregl import op, reference, vicregl_loss

HALVES = (torch.bfloat16, torch.float16)
# (U, V, B, L1, L2, C): one of everything, tiles that do not divide, short rows, many positions.
SHAPES = [
    (1, 1, 1, 1, 1, 1), (1, 1, 2, 3, 2, 2), (2, 3, 3, 5, 7, 8), (1, 1, 3, 49, 49, 33),
    (2, 2, 2, 9, 4, 7), (1, 2, 1, 16, 130, 64), (1, 1, 2, 196, 49, 9), (3, 1, 2, 4, 17, 129),
]  # fmt: skip


def maps(shape, device, dtype=torch.float32):
    u, v, batch, l1, l2, channels = shape
    a = torch.randn(u, batch, l1, channels)
    b = torch.randn(v, batch, l2, channels)
    return a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype)


def assert_matches(a, b, matches):
    """Each choice is the truth's, or one that float32 cannot tell from it."""
    wide = reference._distances(a[:, None].double(), b[None].double()).square()
    # Rounding of the differences' sum, and of differences of values far from zero.
    slack = 4 * torch.finfo(torch.float32).eps * (a.shape[-1] ** 0.5 + 4)
    for distances, nearest, rank in (
        (wide, matches.nearest_a, matches.rank_a),
        (wide.mT, matches.nearest_b, matches.rank_b),
    ):
        assert nearest.dtype == rank.dtype == torch.int32
        assert nearest.shape == rank.shape == distances.shape[:-1]
        least = distances.amin(-1)
        chosen = distances.gather(-1, nearest.long()[..., None])[..., 0]
        assert (chosen <= least * (1 + slack) + 1e-30).all()
        assert torch.equal(
            rank.sort(-1).values, torch.arange(rank.shape[-1]).expand_as(rank).int().to(rank.device)
        )
        ordered = chosen.gather(-1, rank.argsort(-1))
        assert (ordered.diff(dim=-1) >= -slack * ordered[..., 1:]).all()


@pytest.mark.triton_takes(lambda shape, **_: shape in SHAPES[2:4])
@pytest.mark.parametrize("shape", SHAPES)
def test_match(fused, shape):
    a, b = maps(shape, fused.device)
    for x, y in ((a, b), (a + 100, b + 100)):
        assert_matches(x, y, op.match(x, y, fused.name))
    # Products of small whole numbers are exact: every tie must go to the lower index.
    a, b = a.round(), b.round()
    for dtype in (torch.float32, *HALVES):
        matches = op.match(a.to(dtype), b.to(dtype), fused.name)
        for mine, theirs in zip(matches, exact_matches(a, b), strict=True):
            assert torch.equal(mine, theirs)


def exact_matches(a, b):
    """By squared distances, as integers: the reference's roots merge some."""
    a, b = a.double()[:, None, :, :, None], b.double()[None, :, :, None]
    squares = (a - b).square().sum(-1)
    return *reference._nearest(squares), *reference._nearest(squares.mT)


def test_match_of_what_is_not_a_number(fused):
    a, b = maps((1, 1, 3, 13, 10, 9), fused.device)
    a[0, 0, 3, 2] = torch.nan
    b[0, 0, 4, 8] = torch.inf
    a[0, 1, 5] = -torch.inf
    b[0, 2] = torch.nan
    matches = op.match(a, b, fused.name)
    for mine, theirs in zip(matches, reference.match(a, b), strict=True):
        assert torch.equal(mine, theirs)


LAYOUTS = {
    "contiguous": lambda z: z,
    "positions last": lambda z: z.movedim(-1, 2).contiguous().movedim(2, -1),
    "batch first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda z: torch.cat([z, z], -1).repeat_interleave(2, 2)[
        :, :, ::2, : z.shape[-1]
    ],
    "one sample": lambda z: z[:, :1].expand_as(z),
}
RULES = [
    (op.Kept([3], [1.0]), op.Kept([2], [0.5])),
    (op.Kept([5, 2], [0.25, 2.0]), op.Kept([7, 1, 3, 7], [1.0, -0.5, 0.25, 0.1])),
    (op.Kept([1], [1.0]), op.Kept([], [])),
]


def hold_pairs(fused, a, b, matches, kept_a, kept_b, grads=(True, True)):
    dtype = a.dtype

    def run(backend, x, y):
        x, y = (z.detach().requires_grad_(g) for z, g in zip((x, y), grads, strict=True))
        value = op.pairs(x, y, matches, kept_a, kept_b, backend)
        wanted = [z for z in (x, y) if z.requires_grad]
        return value.detach(), *torch.autograd.grad(-1.7 * value, wanted)

    actual, plain = run(fused.name, a, b), run("reference", a, b)
    truth = run("reference", a.double(), b.double())
    for i, (mine, true, formula) in enumerate(zip(actual, truth, plain, strict=True)):
        kind = value_dtype(fused.name, dtype) if i == 0 else dtype
        assert mine.dtype == (torch.float32 if i == 0 else dtype)
        length = max(a.shape[-1], FEWEST_ROUNDINGS)
        assert_close_to_truth(mine, true, formula, kind, length, f"pairs {i}")
    for mine, again in zip(actual, run(fused.name, a, b), strict=True):
        assert torch.equal(mine, again)
    return actual


@pytest.mark.triton_takes(lambda shape, dtype, **_: dtype == torch.float32 and shape in SHAPES[2:4])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs(fused, shape, dtype):
    a, b = maps(shape, fused.device, dtype)
    matches = op.match(a, b, fused.name)
    for kept in RULES:
        counts = [
            op.Kept([min(c, length) for c in rule.counts], rule.weights)
            for rule, length in zip(kept, (a.shape[2], b.shape[2]), strict=True)
        ]
        hold_pairs(fused, a, b, matches, *counts)


@pytest.mark.triton_takes(lambda layout_a, layout_b, **_: layout_b == "contiguous")
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
def test_strides(fused, layout_a, layout_b):
    for dtype in (torch.float32, torch.bfloat16):
        a, b = maps((2, 2, 3, 7, 9, 21), fused.device, dtype)
        a, b = LAYOUTS[layout_a](a), LAYOUTS[layout_b](b)
        matches = op.match(a, b, fused.name)
        assert_matches(a.contiguous(), b.contiguous(), matches)
        hold_pairs(fused, a, b, matches, *RULES[1])


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
def test_the_gradient_of_one_side(fused, grads):
    a, b = maps((2, 2, 3, 7, 9, 21), fused.device)
    matches = op.match(a, b, fused.name)
    (alone,) = hold_pairs(fused, a, b, matches, *RULES[0], grads=grads)[1:]
    both = hold_pairs(fused, a, b, matches, *RULES[0])[1:]
    assert torch.equal(alone, both[grads.index(True)])


def test_one_position_matched_by_all(fused):
    """Every match adds to the same row, in one order."""
    a, b = maps((1, 2, 2, 49, 25, 40), fused.device)
    nearest = [
        torch.full((1, 2, 2, n), 3, dtype=torch.int32, device=fused.device) for n in (49, 25)
    ]
    ranks = [
        torch.arange(n, dtype=torch.int32, device=fused.device).expand(1, 2, 2, n).contiguous()
        for n in (49, 25)
    ]
    matches = op.Matches(nearest[0], ranks[0], nearest[1], ranks[1])
    hold_pairs(fused, a, b, matches, op.Kept([49, 20], [1.0, 1.0]), op.Kept([25], [1.0]))


def hold(fused, inputs, **settings):
    """The whole loss, where matches cannot differ: the truth is of the same float32 inputs."""
    actual = outcome(inputs, fused.name, **settings)
    plain, truth = (
        outcome(inputs, "reference", **settings),
        outcome(inputs, "reference", True, **settings),
    )
    leaf = (inputs[0] or inputs[1])[0]
    length = max(sum(inputs[1][0].shape) if inputs[1] else 0, leaf.shape[-1], FEWEST_ROUNDINGS)
    dtype = leaf.dtype
    for kind, eps_dtype in (("values", value_dtype(fused.name, dtype)), ("gradients", dtype)):
        values = [getattr(o, kind) for o in (actual, truth, plain)]
        for i, (mine, true, formula) in enumerate(zip(*values, strict=True)):
            assert (mine is None) == (true is None)
            if mine is not None:
                assert_close_to_truth(mine, true, formula, eps_dtype, length, f"{kind} {i}")
    return actual


@pytest.mark.triton_takes(lambda way, views, **_: views == "small")
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("way", WAYS)
def test_the_loss(fused, way, views):
    inputs = draw(VIEWS[views], device=fused.device)
    before = [z.detach().clone() for zs in inputs for z in zs]
    actual = hold(fused, inputs, **WAYS[way])
    again = outcome(inputs, fused.name, **WAYS[way])
    for mine, same in zip(
        (*actual.values, *actual.gradients), (*again.values, *again.gradients), strict=True
    ):
        assert mine is None or torch.equal(mine, same)
    for z, kept in zip([z for zs in inputs for z in zs], before, strict=True):
        assert torch.equal(z, kept)


@pytest.mark.triton_takes(lambda **_: False)  # its kernels in half: test_real_shapes, test_vicreg
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", ["published", "fast"])
def test_half(fused, way, dtype):
    hold(fused, draw(VIEWS["small"], dtype=dtype, device=fused.device), **WAYS[way])


@pytest.mark.triton_takes(lambda **_: False)
@settings(max_examples=12)
@given(
    way=st.sampled_from(sorted(WAYS)),
    batch=st.integers(2, 9),
    channels=st.integers(1, 40),
    dim=st.integers(1, 30),
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(3, 5)), min_size=2, max_size=4),
    seed=st.integers(0, 2**20),
)
def test_random_shapes(fused, way, batch, channels, dim, shapes, seed):
    torch.manual_seed(seed)
    least = min(h * w for h, w in shapes)
    settings = {"num_matches": (min(5, least), min(2, least)), **WAYS[way]}
    hold(fused, draw(tuple(shapes), batch, channels, dim, device=fused.device), **settings)


def test_one_search_serves_both_directions_and_roles(fused):
    """Two views: two searches, two sums; nothing of [L, L] is kept for the gradient."""
    inputs = draw(VIEWS["two"], device=fused.device)
    with RecordedOps() as ops:
        outcome(inputs, fused.name)
    names = [name for name, args in ops.calls if fused.name in words(args)]
    for name in ("vicregl_match", "vicregl_pairs_forward", "vicregl_pairs_backward"):
        assert names.count(name) == 2
    assert names.count("tokens_gather") == names.count("tokens_scatter") == 2


def test_nan_propagates(fused):
    for place in range(2):
        inputs = draw(VIEWS["two"], device=fused.device)
        with torch.no_grad():
            inputs[place][1].view(-1)[5] = torch.nan
        assert vicregl_loss(*inputs, num_matches=(5, 3), backend=fused.name).isnan()


def test_threads_do_not_change_bits():
    inputs = draw(VIEWS["small"], batch=5)
    count = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(outcome(inputs, "cpu", fast_vc_reg=True))
    finally:
        torch.set_num_threads(count)
    for other in runs[1:]:
        assert torch.equal(other.values[4], runs[0].values[4])
        for mine, theirs in zip(other.gradients[5:], runs[0].gradients[5:], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_parts_of_a_float16_gradient_may_be_past_float16(fused):
    """The invariance's part and the hinge's, each past 65504, cancel to what float16 holds."""
    torch.manual_seed(24)
    _, maps, grids = draw(((2, 1), (2, 1)), batch=3, channels=2, device=fused.device)
    maps = [z.detach().half().requires_grad_() for z in maps]
    settings = {"alpha": 0.0, "num_matches": (None, 1), "margin": 9.0}
    weights = {"invariance_weight": 1.0, "variance_weight": 4.0, "covariance_weight": 0.0}

    def gradient(backend, views, weights):
        loss = vicregl_loss(None, views, grids, **settings, **weights, backend=backend)
        return torch.cat([z.flatten() for z in torch.autograd.grad(loss * 1.1e5, views)])

    wide = [z.detach().double().requires_grad_() for z in maps]
    most = torch.finfo(torch.float16).max
    for part in ("invariance_weight", "variance_weight"):
        alone = {name: w * (name == part) for name, w in weights.items()}
        assert gradient("reference", wide, alone).abs().max() > most
    truth = gradient("reference", wide, weights)
    assert truth.abs().max() < most
    actual = gradient(fused.name, maps, weights).double()
    assert (actual - truth).norm() < 2 * torch.finfo(torch.float16).eps * truth.norm()
