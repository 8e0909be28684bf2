"""Settings that are numbers: learned where a loss says so, else read or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import vicreg_kernels as vk
from vicreg_kernels.attention import Rope3d

X, Y = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
WEIGHTS = ("invariance_weight", "variance_weight", "covariance_weight")
Q = X.view(1, 1, 12, 6)[..., :4].repeat(1, 1, 1, 4)
INDEX = torch.arange(3)[None]
MAPS = [X.view(2, 3, 2, 6), Y.view(2, 3, 2, 6)]


GRIDS = [torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]


def pooled(**settings):
    return vk.vicregl_loss([X[:2], Y[:2]], MAPS, GRIDS, num_matches=(2, 2), **settings)


# setting -> a call with it; none of them takes a tensor that wants a gradient.
NUMBERS = {
    "vicreg margin": lambda v: vk.vicreg_loss(X, Y, margin=v),
    "vicreg eps": lambda v: vk.vicreg_loss(X, Y, eps=v),
    "terms margin": lambda v: vk.vicreg_terms(X, Y, margin=v),
    "groups eps": lambda v: vk.variance_covariance(X, eps=v),
    "module margin": lambda v: vk.VICRegLoss(margin=v),
    "barlow lambd": lambda v: vk.barlow_twins_loss(X, Y, lambd=v),
    "barlow eps": lambda v: vk.barlow_twins_loss(X, Y, eps=v),
    "vicregl alpha": lambda v: pooled(alpha=v),
    "vicregl margin": lambda v: pooled(margin=v),
    "vicregl variance_weight": lambda v: pooled(variance_weight=v),
    "sigreg t_max": lambda v: vk.sigreg_loss(X, t_max=v),
    "attention scale": lambda v: vk.masked_attention(Q, Q, Q, scale=v),
    "rope theta": lambda v: Rope3d((12,), theta=v),
    "prediction beta": lambda v: vk.prediction_loss(X[None, :3], Y[None], INDEX, beta=v),
    "prediction eps": lambda v: vk.prediction_loss(X[None, :3], Y[None], INDEX, eps=v),
    "norm eps": lambda v: vk.modulated_layer_norm(X, X[0], X[1], eps=v),
    "scatter fill": lambda v: vk.scatter_tokens(X[None, :3], INDEX, 12, fill=v),
    "ema momentum": lambda v: vk.EMA(nn.Linear(2, 2), v),
}


NO_NUMBERS = ["a", "1", [1.0], 1j, torch.ones(2), torch.ones((), requires_grad=True)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("bad", NO_NUMBERS, ids=str)
def test_what_is_no_number_is_refused_by_name(name: str, bad: object) -> None:
    setting = name.split()[1]
    with pytest.raises((TypeError, ValueError), match=rf"^{setting}: got "):
        NUMBERS[name](bad)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor], ids=lambda k: k.__name__)
def test_numbers_of_other_libraries_are_read(name: str, kind: type) -> None:
    plain, other = NUMBERS[name](0.5), NUMBERS[name](kind(0.5))
    if isinstance(plain, torch.Tensor):
        assert torch.equal(plain, other)


BACKENDS = [None, "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learned", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_weights_are_learned(learned, backend) -> None:
    """The gradient of a weight is its term, and x's that of the loss with the numbers."""
    values = [7.0, 3.0, 0.5]
    tensors = {WEIGHTS[k]: torch.tensor(values[k], requires_grad=True) for k in learned}
    numbers = dict(zip(WEIGHTS, values, strict=True))
    x, again = X.clone().requires_grad_(), X.clone().requires_grad_()
    loss = vk.vicreg_loss(x, Y, **{**numbers, **tensors}, backend=backend)
    plain = vk.vicreg_loss(again, Y, **numbers, backend=backend)
    torch.testing.assert_close(loss, plain)
    assert loss.dtype == torch.float32
    loss.backward()
    plain.backward()
    torch.testing.assert_close(x.grad, again.grad)
    terms = vk.vicreg_terms(X, Y, backend=backend)
    for k in learned:
        torch.testing.assert_close(tensors[WEIGHTS[k]].grad, terms[1 + k])


def test_weights_as_parameters_of_the_module() -> None:
    loss = vk.VICRegLoss(nn.Parameter(torch.tensor(25.0)), covariance_weight=None)
    assert [name for name, _ in loss.named_parameters()] == ["invariance_weight"]
    loss(X.clone().requires_grad_(), Y).backward()
    torch.testing.assert_close(loss.invariance_weight.grad, vk.vicreg_terms(X, Y).invariance)


def test_weights_of_other_dtypes_leave_the_loss_as_it_is() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        weight = torch.tensor([2.0], dtype=dtype, requires_grad=True)
        terms = vk.vicreg_terms(X, Y, variance_weight=weight)
        assert terms.loss.dtype == torch.float32
        terms.loss.backward()
        assert weight.grad.dtype == dtype


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones((), dtype=torch.int64)], ids=str)
def test_tensors_that_are_no_weight(bad) -> None:
    with pytest.raises(TypeError, match=r"^variance_weight: got a tensor of shape"):
        vk.vicreg_loss(X, Y, variance_weight=bad)


def test_learned_weights_in_one_graph() -> None:
    def step(x, y, log):
        a, b, c = log.exp()
        return vk.vicreg_loss(x, y, invariance_weight=a, variance_weight=b, covariance_weight=c)

    made = torch.compile(step, fullgraph=True, backend="aot_eager")
    log = torch.zeros(3, requires_grad=True)
    made(X, Y, log).backward()
    gradient, log.grad = log.grad, None
    step(X, Y, log).backward()
    torch.testing.assert_close(gradient, log.grad)
