"""External parity: timm's vision transformers, random weights, with this library's attention,
against themselves; what is not fused is named.
"""

from __future__ import annotations

import copy
import importlib
import logging
import pickle

import pytest
import torch
from torch import nn

from tests.helpers import fused_models, timm_alone
from tests.helpers.fused_models import CLOSE


@pytest.fixture(scope="module", autouse=True)
def timm():
    """timm's layers, its ViTs and Evas, and what fuses them."""
    with timm_alone.importable():
        yield {
            name.rpartition(".")[2]: importlib.import_module(name)
            for name in ("timm.layers", "timm.models.vision_transformer", "timm.models.eva")
        } | {"ours": importlib.import_module("vicreg_kernels.integrations.timm")}


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
VITS = {
    "plain": {},
    "norms": {"qk_norm": True, "scale_attn_norm": True},
    "drops its output": {"proj_drop_rate": 0.5},
    "ResPostBlock": {"block_fn": "ResPostBlock"},
}
EVAS = {
    "rope": {"use_rot_pos_emb": True},
    "rope, attn_type rope": {"use_rot_pos_emb": True, "attn_type": "rope", "qk_norm": True},
    "halves": {"use_rot_pos_emb": True, "attn_type": "rope", "rope_rotate_half": True},
    "separate": {"qkv_fused": False, "use_rot_pos_emb": True},
    "no bias": {"qkv_bias": False},
    "norm": {"scale_attn_inner": True, "num_reg_tokens": 2, "use_rot_pos_emb": True},
}


def sharp(model: nn.Module) -> nn.Module:
    """Queries and keys that look somewhere, as a trained model's do."""
    for name, z in model.named_parameters():
        if any(part in name for part in ("qkv.weight", "q_proj.weight", "k_proj.weight")):
            nn.init.normal_(z, std=0.3)
    return model


def vit(timm, **settings):
    module = timm["vision_transformer"]
    if "block_fn" in settings:
        settings["block_fn"] = getattr(module, settings["block_fn"])
    return sharp(module.VisionTransformer(**{**SIZES, "num_classes": 5, **settings})).eval()


def eva(timm, **settings):
    return sharp(timm["eva"].Eva(**{**SIZES, "num_classes": 5, **settings})).eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VITS)
def test_vits(name, timm):
    model, x = vit(timm, **VITS[name]), images()
    fused = timm["ours"].fuse(copy.deepcopy(model))
    assert len(timm["ours"].report(fused).fused) == 2
    fused_models.assert_same(model, fused, lambda m: (m(x), m.forward_features(x)))


@pytest.mark.parametrize("name", EVAS)
def test_evas(name, timm):
    model, x = eva(timm, **EVAS[name]), images()
    fused = timm["ours"].fuse(copy.deepcopy(model))
    assert timm["ours"].report(fused).left == {}
    fused_models.assert_same(model, fused, lambda m: (m.forward_features(x),))


KEEP = torch.arange(9) < torch.tensor([4, 9, 7])[:, None, None, None]
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "padding": {"attn_mask": KEEP},
    "additive": {"attn_mask": torch.zeros(KEEP.shape).masked_fill(~KEEP, -torch.inf)},
    "keys alone": {"attn_mask": KEEP[1, 0]},
    "by head": {"attn_mask": torch.cat((KEEP, KEEP.flip(-1)), dim=1)},
    "a causal mask": {"attn_mask": torch.ones(9, 9).tril().bool()},
}


@pytest.mark.parametrize("sdpa", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, sdpa, timm):
    """With timm's fused attention and with its own."""
    layers, x = timm["layers"], torch.randn(3, 9, 32)
    for module in (
        layers.Attention(32, 2, gated=True),
        layers.AttentionRope(
            32, 4, attn_head_dim=16, num_kv_heads=2, qkv_fused=False, gated=True, qkv_bias=False
        ),
    ):
        if name == "by head" and module.num_heads == 4:
            continue
        module.fused_attn = sdpa
        fused = timm["ours"].fuse(copy.deepcopy(sharp(module)))
        fused_models.assert_same(module, fused, lambda m: (m(x, **MASKS[name]),))


def test_other_masks_are_refused(timm):
    module, x = timm["ours"].fuse(timm["layers"].Attention(32, 2)), torch.randn(3, 9, 32)
    with pytest.raises(ValueError, match="attn_mask: got one that differs from query to query"):
        module(x, torch.ones(9, 9).triu().bool())
    with pytest.raises(ValueError, match="attn_mask: got shape"):
        module(x, torch.ones(3, 1, 9, 8).bool())
    with pytest.raises(ValueError, match="is_causal: got True with an attn_mask"):
        module(x, KEEP, True)


def test_dropout_of_attention(timm):
    """Fused where it drops nothing; refused, not forgotten, where it would."""
    ours, x = timm["ours"], images()
    with pytest.raises(ValueError, match=r"attn_drop is 0\.1 in training"):
        ours.fuse(vit(timm, attn_drop_rate=0.1).train())
    model = vit(timm, attn_drop_rate=0.1)
    expected = model(x)
    torch.testing.assert_close(ours.fuse(model)(x), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"attn_drop: attn_drop is 0\.1 in training"):
        model.train()(x)
    ours.unfuse(model)(x)


def test_what_is_left_is_named(timm, caplog):
    ours, layers = timm["ours"], timm["layers"]

    class Other(layers.Attention):
        def forward(self, x):
            return super().forward(x) * 2

    class Heir(layers.Attention):
        pass

    model = nn.ModuleDict(
        {
            "fused": layers.Attention(32, 2),
            "heir": Heir(32, 2),
            "diff": layers.DiffAttention(32, 2),
            "pool": layers.AttentionPoolLatent(32, num_heads=2),
            "block": timm["vision_transformer"].ParallelScalingBlock(32, 2),
            "torch": nn.MultiheadAttention(32, 2),
            "narrow": layers.Attention(24, 2),
            "other": Other(32, 2),
            "replaced": layers.Attention(32, 2),
        }
    )
    model["replaced"].forward = nn.Identity().forward
    assert not ours.report(model).fused
    with caplog.at_level(logging.WARNING, "vicreg_kernels"):
        assert ours.fuse(model) is model
    report = ours.report(model)
    assert report.fused == ("fused", "heir")
    known = "is not among the classes that are fused"
    assert report.left == {
        "diff": f"DiffAttention {known}",
        "pool": f"AttentionPoolLatent {known}",
        "block": f"ParallelScalingBlock {known}",
        "torch": f"MultiheadAttention {known}",
        "narrow": "its head dim is 12, attention takes a multiple of 8 from 16 to 128",
        "other": f"Other {known}",
        "replaced": "its forward has been replaced already",
    }
    assert str(report).startswith("2 of 9 attention modules are fused\n  left diff: DiffAttention")
    assert f"ModuleDict: {report}" in caplog.text
    with pytest.raises(ValueError, match="model: got DiffAttention, in which 0 of 1"):
        ours.fuse(model["diff"])
    with pytest.raises(ValueError, match="model: got Linear, in which 0 of 0"):
        ours.fuse(nn.Linear(2, 2))


def test_a_version_that_computes_something_else_is_left(timm, monkeypatch):
    """As timm's own forward would in a version that is not known."""
    layers, ours = timm["layers"], timm["ours"]
    norm = layers.Attention.forward.__globals__["F"]
    with monkeypatch.context() as changed:
        own = norm.scaled_dot_product_attention
        double = lambda *args, **rest: own(*args, **rest) * 2  # noqa: E731
        changed.setattr(norm, "scaled_dot_product_attention", double)
        with pytest.raises(ValueError, match="Attention computes something else than the class"):
            ours.fuse(layers.Attention(32, 2))


def test_unfuse_and_twice(timm):
    ours, model, x = timm["ours"], eva(timm, **EVAS["rope"]), images()
    expected, names = model(x), list(model.state_dict())
    attributes = [set(module.__dict__) for module in model.modules()]
    before = torch.random.get_rng_state()
    assert ours.fuse(ours.fuse(model)) is model
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(model.state_dict()) == names
    model.load_state_dict(model.state_dict())
    assert ours.unfuse(model) is model
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="model: got Eva that is not fused"):
        ours.unfuse(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own_weights(duplicate, timm):
    model, x = timm["ours"].fuse(vit(timm)), images()
    expected = model(x)
    twin = duplicate(model)
    with torch.no_grad():
        for z in model.parameters():
            z.zero_()
    torch.testing.assert_close(twin(x), expected, **CLOSE)
    assert timm["ours"].report(twin).fused == ("blocks.0.attn", "blocks.1.attn")
    timm["ours"].unfuse(twin)
    torch.testing.assert_close(twin(x), expected, **CLOSE)


def test_half_precision(timm):
    """Under autocast and as bfloat16 weights: as far from float32 as timm's own attention."""
    model, x = eva(timm, **EVAS["rope, attn_type rope"]), images()
    fused = timm["ours"].fuse(copy.deepcopy(model))
    wanted = model(x)
    results = []
    for each in (model, fused):
        with torch.autocast("cpu", torch.bfloat16):
            lower = each(x)
        half = each.bfloat16()(x.bfloat16())
        results.append((lower, half))
    for theirs, mine in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        error = (theirs - wanted).abs().max()
        assert (mine - wanted).abs().max() < 2 * error + 1e-2


def test_torch_compile(timm):
    """One graph, and `unfuse` reaches a compiled model."""
    model, x = eva(timm, **EVAS["rope"], depth=1), images()
    expected = model(x)
    compiled = torch.compile(timm["ours"].fuse(model), fullgraph=True, backend="eager")
    found = compiled(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    found.sum().backward()
    timm["ours"].unfuse(model)
    assert torch.equal(compiled(x), expected)
