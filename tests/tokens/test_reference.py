"""Tier 1: the tokens ops' reference against the published formulas, closed forms and gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tokens.cases import KINDS, draw, mask
from vicreg_kernels.tokens import (
    PredictionLoss,
    assemble_tokens,
    gather_tokens,
    prediction_loss,
    scatter_tokens,
)

DOUBLE = {"dtype": torch.float64}


def published_masks(x, index):
    """Rows of each mask through an expanded index, concatenated mask-major."""
    parts = [torch.gather(x, 1, i.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for i in index]
    return torch.cat(parts)


@pytest.mark.parametrize("backend", ["reference", None])
def test_ijepa(backend):
    """Targets layer-normed, gathered for 4 masks, smooth L1 over everything (I-JEPA's training)."""
    teacher, index = draw(3, 20, 16, grad=False), [mask(3, 20, 6).index for _ in range(4)]
    pred = draw(12, 6, 16)
    target = published_masks(F.layer_norm(teacher, (16,)), index)
    expected = F.smooth_l1_loss(pred, target)
    value = prediction_loss(pred, teacher, index, backend=backend)
    torch.testing.assert_close(value, expected)
    grads = [torch.autograd.grad(loss, pred)[0] for loss in (value, expected)]
    torch.testing.assert_close(*grads)
    stacked = prediction_loss(pred, teacher, torch.cat(index), backend=backend)
    assert torch.equal(stacked, value)


@pytest.mark.parametrize("backend", ["reference", None])
def test_ijepa_with_several_contexts(backend):
    """Each mask is predicted from every context: targets repeat for each block of the batch."""
    teacher, index = draw(3, 20, 16, grad=False), [mask(3, 20, 6).index for _ in range(2)]
    pred = draw(2 * 4 * 3, 6, 16)
    target = published_masks(F.layer_norm(teacher, (16,)), index)
    target = torch.cat([target[i * 3 : i * 3 + 3] for i in range(2) for _ in range(4)])
    value = prediction_loss(pred, teacher, index, backend=backend)
    torch.testing.assert_close(value, F.smooth_l1_loss(pred, target))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_vjepa(backend, exponent):
    """The mean of |z - h|^p / p of each mask, then over masks (V-JEPA and V-JEPA 2)."""
    teacher = draw(2, 30, 16, grad=False)
    index = [mask(2, 30, k).index for k in (5, 19)]
    preds = [draw(2, k, 16) for k in (5, 19)]
    normed = F.layer_norm(teacher, (16,))
    expected = 0.0
    for pred, one in zip(preds, index, strict=True):
        gap = torch.abs(pred - published_masks(normed, [one]))
        expected = expected + torch.mean(gap**exponent) / exponent / len(index)
    kind = "l1" if exponent == 1.0 else "mse"
    value = prediction_loss(preds, teacher, index, kind=kind, backend=backend) / exponent
    torch.testing.assert_close(value, expected)
    module = PredictionLoss(kind, backend=backend)
    assert torch.equal(module(preds, teacher, index) / exponent, value)


def test_mean_over_the_tokens_of_all_masks():
    teacher = draw(2, 30, 8, grad=False, **DOUBLE)
    index = [mask(2, 30, k).index for k in (5, 19)]
    preds = [draw(2, k, 8, **DOUBLE) for k in (5, 19)]
    value = prediction_loss(preds, teacher, index, reduction="tokens")
    whole = prediction_loss(torch.cat(preds, 1), teacher, torch.cat(index, 1))
    torch.testing.assert_close(value, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_dense(kind):
    teacher, chosen = draw(3, 9, 8, grad=False, **DOUBLE), mask(3, 9, 4)
    pred = draw(3, 4, 8, **DOUBLE)
    dense = prediction_loss(pred, teacher, chosen.index, kind=kind)
    packed = prediction_loss(
        pred.flatten(0, 1), teacher, chosen.index.flatten(), kind=kind, offsets=[0, 4, 8, 12]
    )
    torch.testing.assert_close(packed, dense)


def test_closed_forms():
    teacher = torch.tensor([[[1.0, 3.0], [5.0, 1.0]]], **DOUBLE)  # normed: (-1, 1), (1, -1)
    index = torch.tensor([[1, 0]])
    pred = torch.tensor([[[1.5, -3.0], [-1.0, 1.0]]], **DOUBLE)  # d: (0.5, -2), (0, 0)
    for kind, expected in (
        ("smooth_l1", (0.125 + 1.5) / 4),
        ("l1", 2.5 / 4),
        ("mse", 4.25 / 4),
        ("cosine", (1 - 4.5 / (11.25 * 2) ** 0.5) / 2),
    ):
        value = prediction_loss(pred, teacher, index, kind=kind, eps=0.0)
        assert value.item() == pytest.approx(expected, rel=1e-12), kind
    plain = prediction_loss(pred, teacher, index, kind="l1", normalize_target=False)
    assert plain.item() == pytest.approx((3.5 + 4.0 + 2.0 + 2.0) / 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_the_loss(kind, packed):
    teacher = draw(2, 5, 4, grad=False, **DOUBLE)
    chosen = mask(2, 5, [1, 3] if packed else 2)
    pred = draw(*chosen.index.shape, 4, **DOUBLE)

    def function(pred):
        return prediction_loss(pred, teacher, chosen.index, kind=kind, **chosen.settings)

    assert torch.autograd.gradcheck(function, pred)


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_rows(packed):
    chosen = mask(2, 5, [1, 3] if packed else 3)
    x, rows = draw(2, 5, 3, **DOUBLE), draw(*chosen.index.shape, 3, **DOUBLE)
    assert torch.autograd.gradgradcheck(
        lambda x: gather_tokens(x, chosen.index, **chosen.settings).sin(), x
    )
    assert torch.autograd.gradgradcheck(
        lambda z: scatter_tokens(z, chosen.index, 5, fill=2.0, **chosen.settings).sin(), rows
    )


def test_scatter_is_the_inverse():
    chosen = mask(3, 9, [0, 9, 4])
    rows = draw(13, 5, grad=False)
    out = scatter_tokens(rows, chosen.index, 9, fill=7.0, **chosen.settings)
    assert torch.equal(gather_tokens(out, chosen.index, **chosen.settings), rows)
    assert (out == 7.0).all(-1).sum() == 27 - 13


@pytest.mark.parametrize("backend", ["reference", None])
def test_vjepa_predictor_order(backend):
    """Concatenate, argsort by position, gather each sample; the targets come back as given."""
    kept = mask(2, 30, 7).index
    rest = torch.stack([torch.tensor(sorted(set(range(30)) - set(k.tolist()))) for k in kept])
    wanted = torch.stack([r[torch.randperm(len(r))[:9]] for r in rest])
    context, token = draw(2, 7, 8), draw(1, 1, 8)
    tokens = torch.cat([context, token.expand(2, 9, -1)], dim=1)
    both = torch.cat([kept, wanted], dim=1)
    order = both.argsort(dim=1)
    expected = torch.stack([tokens[b, order[b]] for b in range(2)])
    made = assemble_tokens(context, kept, token, wanted, backend=backend)
    assert torch.equal(made.tokens, expected)
    assert torch.equal(made.index, both.sort(dim=1).values)
    out = torch.randn(2, 16, 8)  # what a predictor makes of it
    back = out.gather(1, order.argsort(dim=1)[..., None].expand(-1, -1, 8))
    assert torch.equal(made.targets(out, backend=backend), back[:, 7:])


@pytest.mark.parametrize("backend", ["reference", None])
def test_ijepa_predictor_set(backend):
    """Context and mask tokens with their table rows, for several targets, in another order."""
    table, context, token = draw(30, 8), draw(2, 7, 8), draw(8)
    kept, targets = mask(2, 30, 7).index, [mask(2, 30, 5).index for _ in range(3)]
    made = assemble_tokens(context, kept, token, targets, positions=table, backend=backend)
    taken = made.targets(made.tokens, backend=backend)
    for m, index in enumerate(targets):
        part = slice(2 * m, 2 * m + 2)
        assert torch.equal(taken[part], token + table[index])
        own = gather_tokens(made.tokens[part], made.context_rows[part], backend=backend)
        assert torch.equal(own, context + table[kept])


def test_gradcheck_of_the_assembly():
    kept, wanted = mask(2, 6, [3, 0]), mask(2, 6, [1, 4])
    context, token, table = (draw(*s, 2, **DOUBLE) for s in ((3,), (), (6,)))
    offsets = {"context_offsets": kept.offsets, "target_offsets": wanted.offsets}

    def function(context, token, table):
        made = assemble_tokens(context, kept.index, token, wanted.index, positions=table, **offsets)
        return made.tokens.sin()

    assert torch.autograd.gradcheck(function, (context, token, table))
