"""Numbers near the ends of float32: right, or NaN, never a finite wrong loss or gradient."""

from __future__ import annotations

import pytest
import torch

import vicreg_kernels as vk
from tests.attention import cases
from vicreg_kernels.core import library

BACKENDS = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(library.CPU_MISSING is not None, reason="not compiled")
    ),
    "reference",
]
CONVENTIONS = ("barlow_twins", "lightly", "solo_learn", "stable_pretraining", "monai")


def attend(amplitude: float):
    """Nearly equal keys under large scores, as in a network whose norms have run away."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 2, 1, 64, generator=generator)
    noise = [torch.randn(2, 2, 33, 64, generator=generator) for _ in range(4)]
    q = (base + 0.1 * noise[0] / amplitude**0.5) * amplitude**0.5
    k = (base + 0.3 * noise[1] / amplitude**0.5) * amplitude**0.5
    return q, k, noise[2], noise[3]


def differentiate(backend, q, k, v, grad):
    v = v.clone().requires_grad_()
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    out = vk.masked_attention(q, k, v, backend=backend)
    return (out.detach(), torch.autograd.grad(out, v, grad)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amplitude", [1e5, 1e6, 1e7])
def test_attention_s_values_under_huge_scores(backend, amplitude):
    """Scores of 9e5 to 9e7, where float32 still tells the keys apart."""
    tensors = attend(amplitude)
    expected = differentiate("reference", *(z.double() for z in tensors))
    for actual, right in zip(differentiate(backend, *tensors), expected, strict=True):
        assert (actual.double() - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_add_up_to_one_in_the_backward(backend):
    """So that the gradients of all values together are those of all outputs."""
    for exponent in range(0, 34, 3):
        *tensors, grad = attend(10.0**exponent)
        _, gradient = differentiate(backend, *tensors, grad)
        given = grad.double().sum(dim=2)
        assert (gradient.double().sum(dim=2) - given).norm() <= 5e-3 * given.norm(), exponent


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_attention_of_one_key_under_any_score(sign):
    """One key's weight is one, whatever its score, and its value's gradient is the output's."""
    for exponent in range(-18, 19):
        q = torch.full((1, 1, 4, 16), sign * 10.0**exponent)
        v, grad = torch.randn(1, 1, 1, 16, requires_grad=True), torch.randn(1, 1, 4, 16)
        out = vk.masked_attention(q, q[:, :, :1].abs(), v)
        (gradient,) = torch.autograd.grad(out, v, grad)
        torch.testing.assert_close(out, v.expand_as(out))
        torch.testing.assert_close(gradient, grad.sum(dim=2, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_past_float32_leaves_no_key_out(backend, dtype):
    cases.hold_past_float32(backend, dtype, exact=True)


def views(amplitude: float, column: bool):
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(64, 16, generator=generator) for _ in range(2)]
    for z in pair:
        if column:
            z[:, 3] *= amplitude
        else:
            z *= amplitude
    return pair


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("column", [False, True], ids=["all", "one column"])
@pytest.mark.parametrize("wide", [False, True], ids=["N > D", "N < D"])
def test_barlow_is_right_or_nan(backend, convention, column, wide):
    settings = {"convention": convention}
    for exponent in range(-36, 37, 2):
        x, y = views(10.0**exponent, column)
        if wide:
            x, y = x[:9], y[:9]
        truth = vk.barlow_twins_loss(x.double(), y.double(), **settings)
        loss = vk.barlow_twins_loss(x, y, backend=backend, **settings)
        if abs(exponent) <= 16:
            assert loss.isfinite()
        assert loss.isnan() or abs(loss - truth) <= 1e-5 * truth, exponent


@pytest.mark.parametrize("backend", BACKENDS)
def test_barlow_without_eps_is_right_or_nan(backend):
    for exponent in range(-40, 0):
        x, y = views(10.0**exponent, False)
        truth = vk.barlow_twins_loss(x.double(), y.double(), eps=0.0)
        loss = vk.barlow_twins_loss(x, y, eps=0.0, backend=backend)
        if exponent >= -18:
            assert loss.isfinite()
        assert loss.isnan() or abs(loss - truth) <= 1e-5 * truth, exponent


@pytest.mark.skipif(library.CPU_MISSING is not None, reason="not compiled")
def test_a_loss_that_is_nan_has_no_finite_gradient():
    x, y = (z.requires_grad_() for z in views(1e20, True))
    grads = torch.autograd.grad(vk.barlow_twins_loss(x, y, backend="cpu"), (x, y))
    assert all(grad[:, 3].isnan().all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "mse", "cosine"])
@pytest.mark.parametrize("large", ["pred", "teacher"])
def test_a_row_whose_squares_float32_does_not_hold_is_right_or_nan(backend, kind, large):
    """A layer norm or a cosine of infinite squares would be 0, which looks like any other."""
    torch.manual_seed(0)
    pred, teacher, index = torch.randn(1, 4, 24), torch.randn(1, 4, 24), torch.arange(4)[None]
    for exponent in range(15, 37, 3):
        size = 10.0**exponent
        p, t = (size * pred, teacher) if large == "pred" else (pred, size * teacher)
        settings = {"kind": kind, "normalize_target": large == "teacher"}
        p.requires_grad_()
        loss = vk.prediction_loss(p, t, index, backend=backend, **settings)
        (grad,) = torch.autograd.grad(loss, p)
        assert not (loss.isnan() and grad.isfinite().any()) or backend == "reference"
        p, loss = p.detach(), loss.detach()
        truth = vk.prediction_loss(p.double(), t.double(), index, backend="reference", **settings)
        assert not loss.isfinite() or abs(loss - truth) <= 1e-5 * truth, exponent


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_norm_of_a_variance_that_is_no_normal_number_is_right_or_nan(backend):
    torch.manual_seed(0)
    pred, teacher, index = torch.randn(1, 4, 24), torch.randn(1, 4, 24), torch.arange(4)[None]
    for exponent in range(-40, -14):
        t = 10.0**exponent * teacher
        loss = vk.prediction_loss(pred, t, index, eps=0.0, backend=backend)
        truth = vk.prediction_loss(pred.double(), t.double(), index, eps=0.0, backend="reference")
        assert loss.isnan() or abs(loss - truth) <= 1e-5 * truth, exponent
        assert loss.isfinite() or exponent < -18


def test_a_margin_that_float32_cannot_compare_is_refused():
    """relu(margin - deviation) of a deviation whose squares pass float32 would be 0."""
    z = 1e20 * torch.randn(8, 4)
    for call in (
        lambda: vk.variance_covariance(z, margin=1e21),
        lambda: vk.vicreg_loss(z, z, margin=1e21),
    ):
        with pytest.raises(ValueError, match=r"^margin: got 1e\+21, takes .* <= 1e\+15"):
            call()


@pytest.mark.skipif(library.CPU_MISSING is not None, reason="not compiled")
@pytest.mark.parametrize("size", [1e18, 6.2e25, 1.5e27])
def test_a_cosine_whose_squares_float32_does_not_hold_is_not_zero(size):
    """NaN: the 0 that torch's own cosine_similarity gives there would look like any other."""
    torch.manual_seed(0)
    pred = (size * torch.randn(1, 4, 24)).requires_grad_()
    teacher, index = torch.randn(1, 4, 24), torch.arange(4)[None]
    loss = vk.prediction_loss(pred, teacher, index, kind="cosine", backend="cpu")
    (grad,) = torch.autograd.grad(loss, pred)
    if size < 1e19:
        truth = vk.prediction_loss(
            pred.detach().double(), teacher.double(), index, kind="cosine", backend="reference"
        )
        assert abs(loss.item() - truth.item()) <= 1e-6
    else:
        assert loss.isnan()
        assert grad.isnan().all()
