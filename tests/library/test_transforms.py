"""Transforms of torch.func, meta tensors, and tensors without heads: taken or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import vicreg_kernels as vk

X, Y = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
Q = torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(1))
INDEX = torch.arange(3)[None]


def attend(q: Tensor) -> Tensor:
    return vk.masked_attention(q, q.flip(-2), q.sin()).square().sum()


# name -> (a loss of one example, examples along the first dimension)
LOSSES = {
    "vicreg": (lambda x: vk.vicreg_loss(x, Y[0]), X),
    "barlow": (lambda x: vk.barlow_twins_loss(x, Y[0]), X),
    "sigreg": (lambda x: vk.sigreg_loss(x, seed=1), X),
    "prediction": (lambda x: vk.prediction_loss(x[None, :3], Y[:1], INDEX), X),
    "attention": (attend, Q),
    "rope": (lambda q: vk.apply_rope(q, vk.Rope3d((8,))).sin().sum(), Q),
    "adaln": (
        lambda x: vk.modulated_layer_norm(x[None], X[0, :1], X[1, :1]).sin().sum(),
        X,
    ),
    "gate": (lambda x: vk.gated_residual(x, x.sin(), X[0, 0]).square().sum(), X),
    "gather": (lambda x: vk.gather_tokens(x[None], INDEX).square().sum(), X),
    "scatter": (lambda x: vk.scatter_tokens(x[None, :3], INDEX, 8).square().sum(), X),
    "assembly": (
        lambda x: vk.assemble_tokens(x[None, :3], INDEX, x[None, 3:6], INDEX + 3)[0].square().sum(),
        X,
    ),
    "vicregl": (
        lambda x: vk.vicregl_loss([x, Y[0]], None, None, alpha=1.0),
        X,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_torch_func(name: str) -> None:
    loss, examples = LOSSES[name]
    gradients, values = torch.func.vmap(torch.func.grad_and_value(loss))(examples)
    for k, example in enumerate(examples):
        z = example.clone().requires_grad_()
        value = loss(z)
        (gradient,) = torch.autograd.grad(value, z)
        torch.testing.assert_close(values[k], value.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients[k], gradient, rtol=1e-4, atol=1e-5)
    direction = torch.ones_like(examples[0])
    _, slope = torch.func.jvp(loss, (examples[0],), (direction,))
    # torch gives the slope of a 0-d tensor times a number in float64
    torch.testing.assert_close(slope.float(), gradients[0].sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_derivatives(name: str) -> None:
    loss, examples = LOSSES[name]
    z = examples[0].clone().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
    direction = examples[1]
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(loss(forward_ad.make_dual(examples[0], direction))).tangent
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-3, atol=1e-4)
        # A backward that begins outside is that of the fused op, which has no such derivative.
        weight = forward_ad.make_dual(torch.ones(()), torch.ones(()))
        with pytest.raises(RuntimeError, match=r"^the fused .* has no forward-mode derivative"):
            torch.autograd.grad(value, z, weight)


def test_a_fused_backend_that_is_named_says_what_transforms_it() -> None:
    def loss(x: Tensor) -> Tensor:
        return vk.vicreg_loss(x, Y[0], backend="cpu")

    if loss(X[0]) is None:
        pytest.skip("cpu is not built")
    says = r"backend='cpu' cannot run vicreg here: torch.func"
    with pytest.raises(RuntimeError, match=says):
        torch.func.grad(loss)(X[0])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=says):
        loss(X[0])


@pytest.mark.parametrize("outside", [False, True], ids=["torch.func", "forward_ad"])
def test_forward_mode_derivatives_of_a_teacher(outside: bool) -> None:
    """As of the same update in plain PyTorch: 3/4 of the teacher's and 1/4 of the student's."""

    def updated(teacher: Tensor, student: Tensor) -> Tensor:
        teacher = teacher * 1.0
        vk.ema_update_([teacher], [student], 0.75)
        return teacher

    values, slopes = (torch.zeros(3), torch.ones(3)), (torch.ones(3), torch.full((3,), 5.0))
    if outside:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*both) for both in zip(values, slopes, strict=True)]
            value, slope = forward_ad.unpack_dual(updated(*duals))
    else:
        value, slope = torch.func.jvp(updated, values, slopes)
    assert value.tolist() == [0.25] * 3
    assert slope.tolist() == [2.0] * 3


@pytest.mark.parametrize("name", LOSSES)
def test_meta_tensors(name: str) -> None:
    """A model on meta has shapes alone; its loss has too."""
    if name in ("prediction", "gather", "scatter", "assembly", "adaln", "gate", "vicregl"):
        pytest.skip("the other tensors here are on the CPU")
    loss, examples = LOSSES[name]
    if name in ("vicreg", "barlow"):
        kernel = vk.vicreg_loss if name == "vicreg" else vk.barlow_twins_loss
        value = kernel(examples[0].to("meta"), Y[0].to("meta"))
    else:
        value = loss(examples[0].to("meta"))
    assert value.device.type == "meta"
    assert value.shape == ()


@pytest.mark.parametrize("shape", [(19, 0, 64), (2, 0, 19, 64), (2, 1, 0, 64)], ids=str)
def test_attention_without_heads_or_tokens_is_refused(shape) -> None:
    q = torch.zeros(shape)
    mask = vk.Ragged(torch.tensor([0, 19])) if q.dim() == 3 else None
    with pytest.raises(ValueError, match=r"^q: got no elements"):
        vk.masked_attention(q, q, q, mask=mask)
    with pytest.raises(ValueError, match=r"^x: got no elements"):
        vk.apply_rope(q, vk.Rope3d((19,)))


def test_meta_integers_beside_tensors_with_values_are_refused() -> None:
    index = torch.arange(8).to("meta")
    with pytest.raises(ValueError, match=r"^index: got a meta tensor"):
        vk.apply_rope(Q[0], vk.Rope3d((8,), index=index))
    with pytest.raises(ValueError, match=r"^lengths: got a meta tensor"):
        vk.masked_attention(Q[0], Q[0], Q[0], mask=vk.KeyPadding(torch.tensor([3]).to("meta")))


@pytest.mark.parametrize("bad", [["vicreg"], {}, 1], ids=str)
def test_names_that_are_no_words(bad: object) -> None:
    for call, name in (
        (lambda: vk.vicreg_loss(X[0], Y[0], convention=bad), "convention"),
        (lambda: vk.barlow_twins_loss(X[0], Y[0], convention=bad), "convention"),
        (lambda: vk.sigreg_loss(X[0], convention=bad), "convention"),
        (lambda: vk.variance_covariance(X[0], covariance_normalizer=bad), "covariance_normalizer"),
        (lambda: vk.prediction_loss(X[:1, :3], Y[:1], INDEX, kind=bad), "kind"),
        (lambda: vk.vicreg_loss(X[0], Y[0], backend=bad), "backend"),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: got "):
            call()
