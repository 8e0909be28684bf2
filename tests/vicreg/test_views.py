"""VICRegLoss of more than two views: the mean over pairs of each published two-view loss."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers.tolerances import SAME_FORMULA, assert_close_to_truth, relative_error
from tests.vicreg.test_conventions import PUBLISHED, TAKES_POSITIONS
from vicreg_kernels import VICRegLoss, vicregl_loss


def views(count, *shape, dtype=torch.float64):
    common = torch.randn(shape, dtype=torch.float64) * torch.linspace(0.3, 2.0, shape[-1])
    return [
        (common + 0.5 * torch.randn(shape, dtype=torch.float64) + 1.0).to(dtype).requires_grad_()
        for _ in range(count)
    ]


def pairs(name, views, weights):
    """The mean over pairs of the published two-view loss: each view is in as many pairs."""
    losses = [PUBLISHED[name](x, y, weights) for x, y in itertools.combinations(views, 2)]
    return sum(losses) / len(losses)


def assert_same(ours, theirs, views):
    value, expected = ours(views), theirs(views)
    assert relative_error(value, expected) < SAME_FORMULA
    gradients = torch.autograd.grad(value, views)
    for mine, slope in zip(gradients, torch.autograd.grad(expected, views), strict=True):
        assert relative_error(mine, slope) < SAME_FORMULA


@pytest.mark.parametrize("shape", [(5, 3), (4, 9), (12, 12)])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", PUBLISHED)
def test_mean_over_pairs(name, count, shape):
    weights = (3.0, 2.0, 0.5)
    loss = VICRegLoss(*weights, convention=name)
    assert_same(loss, lambda z: pairs(name, z, weights), views(count, *shape))


@pytest.mark.parametrize("name", TAKES_POSITIONS)
def test_positions(name):
    loss = VICRegLoss(convention=name)
    assert_same(loss, lambda z: pairs(name, z, (25.0, 25.0, 1.0)), views(3, 6, 2, 2, 5))


def test_as_vicregls_embeddings():
    """Of two large crops alone; of others it counts the pairs with a large one."""
    weights = {"invariance_weight": 3.0, "variance_weight": 2.0}
    loss = VICRegLoss(**weights, convention="vicregl")
    assert_same(loss, lambda z: vicregl_loss(z, None, None, alpha=1.0, **weights), views(2, 8, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused(dtype):
    """Within the rule of tolerances."""
    z = views(4, 24, 40, dtype=dtype)
    loss = VICRegLoss()(z)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, z)

    def of(views, backend):
        value = VICRegLoss(backend=backend)(views)
        return [value, *torch.autograd.grad(value, views)]

    wide = [v.detach().double().requires_grad_() for v in z]
    rows = zip([loss, *gradients], of(wide, "reference"), of(z, "reference"), strict=True)
    for k, (mine, truth, plain) in enumerate(rows):
        kind = torch.float32 if k == 0 else dtype
        assert mine.dtype == kind
        assert_close_to_truth(mine, truth, plain, kind, 24 + 40, f"{k}")


def test_weights_that_are_learned():
    weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    z = views(3, 8, 5)
    loss = VICRegLoss(3.0, weight, 0.5)(z)
    (slope,) = torch.autograd.grad(loss, weight)
    assert relative_error(loss, pairs("vicreg", z, (3.0, 2.0, 0.5))) < SAME_FORMULA
    assert relative_error(slope, pairs("vicreg", z, (0.0, 1.0, 0.0))) < SAME_FORMULA


def test_compiled():
    z = views(3, 8, 5, dtype=torch.float32)
    loss = VICRegLoss()
    compiled = torch.compile(lambda *views: loss(views), fullgraph=True, backend="aot_eager")
    for mine, plain in zip(
        torch.autograd.grad(compiled(*z), z), torch.autograd.grad(loss(z), z), strict=True
    ):
        torch.testing.assert_close(mine, plain)


X = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("settings", "inputs", "error", "message"),
    [
        ({}, ([X],), ValueError, "x: got a list of 1 views, takes at least 2"),
        ({}, ([],), ValueError, "x: got a list of 0 views, takes at least 2"),
        ({}, ([X, X, X], X), TypeError, "y: got Tensor with a list, takes None"),
        ({}, (X,), TypeError, "y: got NoneType"),
        ({}, ([X, X, 3],), TypeError, "x[2]: got int"),
        ({}, ((X, X[:5], X),), ValueError, "x[1]: got shape (5, 4), takes x[0]'s shape (6, 4)"),
        ({}, ([X, X, X.double()],), TypeError, "x[2]: got dtype torch.float64, takes x[0]'s"),
        ({}, ([X[:1]] * 3,), ValueError, "x[0]: got 1 rows"),
        ({}, ([X[None]] * 3,), ValueError, "x[0]: got shape (1, 6, 4), takes [N, D] with conv"),
        ({}, ([X.int()] * 3,), TypeError, "x[0]: got dtype torch.int32"),
        ({}, ([X.to("meta"), X, X],), ValueError, "x[1]: got device cpu, takes x[0]'s device"),
        ({"convention": "eb_jepa"}, ([X[:, :1]] * 3,), ValueError, "x[0]: got D = 1"),
        ({"invariance_weight": "no"}, ([X] * 3,), TypeError, "invariance_weight: got"),
        ({"covariance_weight": float("nan")}, ([X] * 3,), ValueError, "covariance_weight: got"),
        ({"variance_weight": X}, ([X] * 3,), TypeError, "variance_weight: got a tensor of shape"),
    ],
)  # fmt: skip
def test_refused_by_name(settings, inputs, error, message):
    with pytest.raises(error) as raised:
        VICRegLoss(**settings)(*inputs)
    assert str(raised.value).startswith(message)
