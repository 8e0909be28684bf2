"""External parity: Hugging Face transformers' V-JEPA 2 and I-JEPA models, random weights, with
attention and rotary position replaced through transformers' own registry, against themselves.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.helpers import fused_models
from tests.helpers.fused_models import CLOSE

transformers = pytest.importorskip("transformers")

from vicreg_kernels.integrations.transformers import fuse, unfuse  # noqa: E402


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


def assert_same(model, run):
    return fused_models.assert_same(model, fuse(copy.deepcopy(model)), run)


def test_vjepa2_whole_clip():
    video = torch.randn(2, 8, 3, 64, 64)
    calls = assert_same(vjepa2(), lambda model: (model(video, skip_predictor=True)[0],))
    assert all(args[13] is not None for name, args in calls if name == "attention_forward"), "rope"


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


def sharp(model):
    """Queries and keys that look somewhere, as a trained model's do."""
    for name, parameter in model.named_parameters():
        if "query.weight" in name or "key.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def hidden(model, video):
    with torch.no_grad():
        return model(video, skip_predictor=True).last_hidden_state


@pytest.mark.parametrize("how", ["set_attn_implementation", "config"])
def test_another_implementation_set_after_fuse_rotates(how):
    plain, video = sharp(vjepa2()), torch.randn(1, 8, 3, 64, 64)
    expected = hidden(plain, video)
    fused = fuse(copy.deepcopy(plain))
    for name in ("eager", "sdpa", "vicreg_kernels", "eager"):
        if how == "config":
            fused.config._attn_implementation = name
        else:
            fused.set_attn_implementation(name)
        torch.testing.assert_close(hidden(fused, video), expected, **CLOSE)


@pytest.mark.parametrize("given", [None, "sdpa"])
def test_unfuse(given):
    plain, video = sharp(vjepa2()), torch.randn(1, 8, 3, 64, 64)
    expected = hidden(plain, video)
    attributes = [set(module.__dict__) for module in plain.modules()]
    fused = fuse(fuse(plain))  # twice is as once
    hidden(fused, video)
    assert unfuse(fused, given) is plain
    assert plain.config._attn_implementation == (given or "eager")
    assert [set(module.__dict__) for module in plain.modules()] == attributes
    torch.testing.assert_close(hidden(plain, video), expected, **CLOSE)
    with pytest.raises(ValueError, match="model: got VJEPA2Model that is not fused"):
        unfuse(plain)


def test_unfuse_where_fuse_found_this_library_s():
    model = fuse(ijepa())
    again = fuse(transformers.IJepaModel(model.config))
    with pytest.raises(ValueError, match="attn_implementation: got None"):
        unfuse(again)
    assert unfuse(again, "sdpa").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_rotates_by_itself(duplicate):
    fused, video = fuse(sharp(vjepa2())), torch.randn(1, 8, 3, 64, 64)
    expected = hidden(fused, video)
    twin = duplicate(fused)
    torch.testing.assert_close(hidden(twin, video), expected, **CLOSE)
    twin.set_attn_implementation("eager")
    torch.testing.assert_close(hidden(twin, video), expected, **CLOSE)
    torch.testing.assert_close(hidden(fused, video), expected, **CLOSE)
    assert all(
        module.get_position_ids.args[0] is module
        for module in twin.modules()
        if "get_position_ids" in module.__dict__
    )


def test_a_model_with_padding():
    """transformers passes no mask to an attention function that has no mask function beside it."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 50, (2, 9))
    keep = (torch.arange(9) < torch.tensor([4, 9])[:, None]).long()
    expected = model(ids, attention_mask=keep).last_hidden_state
    states = fuse(model)(ids, attention_mask=keep).last_hidden_state
    torch.testing.assert_close(states[keep.bool()], expected[keep.bool()], **CLOSE)


def test_a_causal_model_decodes():
    """A cache: one query beside many keys, which is not causal from the first key on."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    keep = torch.ones(2, 9).long()
    keep[0, 6:] = 0
    for mask in (None, keep):
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation("vicreg_kernels")
        whole = model(ids, attention_mask=mask).last_hidden_state
        seen = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(whole[seen], expected[seen], **CLOSE)
    expected = model(ids).last_hidden_state
    first = model(ids[:, :8], use_cache=True)
    last = model(ids[:, 8:], past_key_values=first.past_key_values).last_hidden_state
    torch.testing.assert_close(last[:, 0], expected[:, 8], **CLOSE)


def test_a_model_that_does_not_go_through_the_registry_is_refused():
    model = ijepa()
    model._can_set_attn_implementation = lambda: False
    with pytest.raises(ValueError, match="model: got IJepaModel"):
        fuse(model)
