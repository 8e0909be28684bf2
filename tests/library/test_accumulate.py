"""Gradient caching gives the gradient of the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vicreg_kernels import accumulate, vicreg_loss

ROWS, FEATURES, DIM = 12, 10, 16


def encoder(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    # A bias of the last layer would have no gradient: the loss is of centred embeddings.
    layers = [nn.Linear(FEATURES, 20), nn.GELU(), *extra, nn.Linear(20, DIM, bias=False)]
    return nn.Sequential(*layers)


def views(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, FEATURES, generator=generator)
    return x, x + 0.3 * torch.randn(rows, FEATURES, generator=generator)


def micro_batches(*sizes: int) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(view.split(sizes) for view in views(sum(sizes))), strict=True))


def under_one_graph(loss, model, batches) -> torch.Tensor:
    """What accumulate stands for: every micro-batch encoded in order, then one backward."""
    parts = [tuple(model(view) for view in batch) for batch in batches]
    value = loss(*(torch.cat(z) for z in zip(*parts, strict=True)))
    value.backward()
    return value.detach()


def assert_same_gradients(model, expected, relative=1e-6):
    pairs = zip(model.named_parameters(), expected.parameters(), strict=True)
    for (name, mine), theirs in pairs:
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error <= relative, (name, error.item())


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 9, 2), (12,)])
def test_equals_the_whole_batch(sizes):
    model = encoder(nn.LayerNorm(20, elementwise_affine=False))
    whole = copy.deepcopy(model)
    value = accumulate(vicreg_loss, model, micro_batches(*sizes))
    expected = under_one_graph(vicreg_loss, whole, [views()])
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert_same_gradients(model, whole)


def test_differs_from_ordinary_accumulation():
    """The mistake that this is for: the mean of the micro-batches' losses has another gradient."""
    model = encoder()
    whole = copy.deepcopy(model)
    batches = micro_batches(4, 4, 4)
    for batch in batches:
        (vicreg_loss(*(model(view) for view in batch)) / len(batches)).backward()
    under_one_graph(vicreg_loss, whole, [views()])
    mine, theirs = model[0].weight.grad, whole[0].weight.grad
    assert (mine - theirs).norm() / theirs.norm() > 0.1


def test_dropout_draws_the_same_masks_and_the_generator_moves_on_once():
    model = encoder(nn.Dropout(0.5))
    whole = copy.deepcopy(model)
    batches = micro_batches(4, 6, 2)

    def drawing(x, y):
        return vicreg_loss(x, y) * torch.rand(())

    torch.manual_seed(3)
    value = accumulate(drawing, model, batches)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = under_one_graph(drawing, whole, batches)
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert_same_gradients(model, whole)


class Drifting(nn.Module):
    """A buffer that changes what the module does, as spectral norm's does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.mul_(0.9)
        return x * self.scale.clone()


def test_buffers_end_as_after_one_pass():
    model = encoder(nn.BatchNorm1d(20), Drifting())
    whole = copy.deepcopy(model)
    batches = micro_batches(4, 6, 2)
    accumulate(vicreg_loss, model, batches)
    under_one_graph(vicreg_loss, whole, batches)
    assert model[2].num_batches_tracked == 6
    for mine, theirs in zip(model.buffers(), whole.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert_same_gradients(model, whole)


def test_adds_to_gradients_that_are_there():
    model = encoder()
    whole = copy.deepcopy(model)
    for _ in range(2):
        accumulate(vicreg_loss, model, micro_batches(6, 6))
        under_one_graph(vicreg_loss, whole, [views()])
    assert_same_gradients(model, whole)


def test_one_call_of_the_encoder_may_take_and_give_anything():
    model = encoder()
    whole = copy.deepcopy(model)
    batches = [{"x": x, "y": y} for x, y in micro_batches(5, 7)]

    def both(batch):
        return [model(batch["x"]), model(batch["y"])]

    accumulate(vicreg_loss, both, batches, modules=[model])
    under_one_graph(vicreg_loss, whole, [views()])
    assert_same_gradients(model, whole)


def test_one_view():
    model = encoder()
    whole = copy.deepcopy(model)
    x = views()[0]

    def loss(z):
        return z.var(0).sum()

    accumulate(loss, model, x.split(5))
    loss(whole(x)).backward()
    assert_same_gradients(model, whole)


def test_a_stop_gradient_branch_gets_none():
    model, target = encoder(), encoder(nn.ReLU()).requires_grad_(False)
    whole = copy.deepcopy(model)
    x = views()[0]

    def loss(z, t):
        return (z - t).square().mean()

    def both(batch):
        return model(batch["x"]), target(batch["x"])

    accumulate(loss, both, [{"x": part} for part in x.split(6)], modules=[model, target])
    loss(whole(x), target(x)).backward()
    assert_same_gradients(model, whole)
    assert all(p.grad is None for p in target.parameters())


def test_under_autocast_the_second_pass_has_a_graph():
    """Autocast keeps the weights it has cast; those of the first pass have no graph."""
    model = encoder()
    whole = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulate(vicreg_loss, model, micro_batches(6, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [tuple(whole(view) for view in batch) for batch in micro_batches(6, 6)]
        loss = vicreg_loss(*(torch.cat(z) for z in zip(*parts, strict=True)))
    loss.backward()
    assert_same_gradients(model, whole, relative=2e-2)


def test_a_scaler_multiplies_the_gradient():
    model = encoder()
    whole = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    value = accumulate(vicreg_loss, model, micro_batches(6, 6), scaler=scaler)
    expected = under_one_graph(lambda x, y: 8 * vicreg_loss(x, y), whole, [views()])
    torch.testing.assert_close(8 * value, expected)
    assert_same_gradients(model, whole)


def test_costs_two_forward_passes_and_one_backward():
    model = encoder()

    def loss(z):
        return z.var(0).sum()

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(views()[0])
    with FlopCounterMode(display=False) as backward:
        loss(model(views()[0])).backward()
    with FlopCounterMode(display=False) as total:
        accumulate(loss, model, views()[0].split(4))
    assert total.get_total_flops() == backward.get_total_flops() + forward.get_total_flops()


def test_holds_one_micro_batch_of_activations():
    """Tensors alive in a backward are those of one micro-batch, not of all."""
    alive: list[int] = []

    class Counting(nn.Module):
        count = 0

        def forward(self, x):
            if torch.is_grad_enabled():
                Counting.count += 1
                x.register_hook(lambda g: alive.append(Counting.count))
            return x

    model = nn.Sequential(nn.Linear(FEATURES, 20), Counting(), nn.Linear(20, DIM))
    accumulate(lambda z: z.var(0).sum(), model, views()[0].split(3))
    assert alive == [1, 2, 3, 4]  # each backward comes before the next forward


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": 3}, TypeError, "loss: got int"),
        ({"loss": lambda x, y: (x - y).square()}, ValueError, "loss: returned"),
        ({"loss": lambda x, y: x.detach().sum()}, ValueError, "loss: does not depend"),
        ({"encoder": None}, TypeError, "encoder: got NoneType"),
        ({"encoder": lambda x: x.sum()}, TypeError, "encoder: gave Tensor"),
        ({"micro_batches": []}, ValueError, "micro_batches: got none"),
        ({"micro_batches": iter(micro_batches(6, 6))}, TypeError, "micro_batches: got"),
        ({"micro_batches": torch.randn(12, 10)}, TypeError, "micro_batches: got Tensor"),
        (
            {"micro_batches": [micro_batches(6)[0], micro_batches(6)[0][:1]]},
            ValueError,
            r"encoder: gave .* for micro_batches\[1\]",
        ),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    model = encoder(nn.BatchNorm1d(20))
    before = copy.deepcopy(model.state_dict())
    given = {"loss": vicreg_loss, "encoder": model, "micro_batches": micro_batches(6, 6)} | change
    with pytest.raises(error, match=message):
        accumulate(**given)
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_encoder_that_changes_between_passes_is_an_error():
    sizes = iter((6, 6, 6, 5))

    def shrinking(x):
        return torch.ones(next(sizes), DIM, requires_grad=True) * x.sum()

    with pytest.raises(RuntimeError, match="second pass"):
        accumulate(lambda z: z.sum(), shrinking, [torch.ones(6, 3), torch.ones(6, 3)])
