"""External parity: Hugging Face transformers' V-JEPA 2 and I-JEPA models, random weights, with
attention and rotary position replaced through transformers' own registry, against themselves.
"""

from __future__ import annotations

import copy

import pytest
import torch
from recording import RecordedOps

transformers = pytest.importorskip("transformers")

from vicreg_kernels.integrations.transformers import attention_forward, fuse  # noqa: E402

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def vjepa2():
    config = transformers.VJEPA2Config(
        crop_size=64, patch_size=16, frames_per_clip=8, tubelet_size=2, hidden_size=128,
        num_attention_heads=2, num_hidden_layers=3, mlp_ratio=2, pred_hidden_size=64,
        pred_num_attention_heads=2, pred_num_hidden_layers=2, pred_num_mask_tokens=2,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.VJEPA2Model(config).train()


def ijepa(heads: int = 2):
    config = transformers.IJepaConfig(
        image_size=64, patch_size=8, hidden_size=80 * heads, num_attention_heads=heads,
        num_hidden_layers=3, intermediate_size=128, attn_implementation="eager",
    )  # fmt: skip
    return transformers.IJepaModel(config).train()


def outcome(model, run):
    """Outputs, and the gradient of every parameter."""
    outputs = run(model)
    loss = sum((out * torch.linspace(-1, 1, out.shape[-1])).sum() for out in outputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return outputs, dict(zip(names, gradients, strict=True))


def assert_same(model, run):
    fused = fuse(copy.deepcopy(model))
    expected, expected_gradients = outcome(model, run)
    with RecordedOps() as ops:
        actual, gradients = outcome(fused, run)
    names = [name for name, _ in ops.calls]
    assert "attention_forward" in names
    assert "attention_backward" in names
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    # A key's bias moves all scores of a query alike: without rotation its gradient is rounding.
    largest = max(g.abs().max() for g in expected_gradients.values() if g is not None)
    for name, theirs in expected_gradients.items():
        if theirs is None:
            assert gradients[name] is None, name
            continue
        size = torch.maximum(theirs.abs().max(), 1e-3 * largest)
        torch.testing.assert_close(gradients[name] / size, theirs / size, **CLOSE, msg=name)
    return ops.calls


def test_vjepa2_whole_clip():
    video = torch.randn(2, 8, 3, 64, 64)
    calls = assert_same(vjepa2(), lambda model: (model(video, skip_predictor=True)[0],))
    assert all(args[12] is not None for name, args in calls if name == "attention_forward"), "rope"


def test_vjepa2_with_masks_and_predictor():
    """Context and target masks: the encoder and the predictor rotate by the kept tokens' places."""
    video = torch.randn(2, 8, 3, 64, 64)
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    context, target = order[:, :20].sort().values, order[:, 20:50].sort().values

    def run(model):
        out = model(video, context_mask=[context], target_mask=[target])
        return out.last_hidden_state, out.predictor_output.last_hidden_state

    assert_same(vjepa2(), run)


def test_ijepa():
    images = torch.randn(2, 3, 64, 64)
    assert_same(ijepa(), lambda model: (model(images).last_hidden_state,))


def test_the_state_dict_is_untouched():
    model = ijepa()
    names = list(model.state_dict())
    assert list(fuse(model).state_dict()) == names


def test_padding_and_causal_masks():
    q, k, v = (torch.randn(2, 2, 9, 16) for _ in range(3))
    keep = torch.arange(9) < torch.tensor([4, 9])[:, None]
    additive = torch.zeros(2, 1, 1, 9).masked_fill(~keep[:, None, None], -torch.inf)
    module = torch.nn.Module()
    plain = torch.nn.functional.scaled_dot_product_attention
    for mask in (keep[:, None, None], additive):
        expected = plain(q, k, v, attn_mask=keep[:, None, None]).transpose(1, 2)
        torch.testing.assert_close(attention_forward(module, q, k, v, mask)[0], expected)
    expected = plain(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attention_forward(module, q, k, v, is_causal=True)[0], expected)


def test_what_cannot_be_replaced_is_refused():
    q = torch.randn(2, 2, 9, 16)
    with pytest.raises(ValueError, match=r"dropout: got 0\.1, takes 0"):
        attention_forward(torch.nn.Module(), q, q, q, None, dropout=0.1)
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        attention_forward(torch.nn.Module(), q, q, q, torch.ones(2, 1, 9, 9, dtype=torch.bool))
