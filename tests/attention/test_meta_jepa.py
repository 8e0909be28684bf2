"""Attention modules with the interfaces of facebookresearch's ijepa, jepa and vjepa2 against their
fused selves: modules written here in plain PyTorch, and where one of the repositories is on the
path, its own models.

    git clone https://github.com/facebookresearch/vjepa2 /tmp/vjepa2      # or jepa, or ijepa
    PYTHONPATH=/tmp/vjepa2 pytest tests/attention/test_meta_jepa.py       # needs einops and timm
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vicreg_kernels as vk
from tests.helpers import fused_models, timm_alone
from tests.helpers.fused_models import CLOSE
from vicreg_kernels.attention.rope import Rope3d
from vicreg_kernels.integrations.meta_jepa import fuse, report, unfuse


class Plain(nn.Module):
    """What the modules below have in common, in plain PyTorch."""

    def __init__(self, dim: int = 64, heads: int = 2, **settings: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, 0.3
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.normal_(self.qkv.weight, std=0.2)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        for name, value in settings.items():
            setattr(self, name, value)

    def run(self, x: Tensor, seen: Tensor | None = None, rope: Rope3d | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = (vk.apply_rope(z, rope, backend="reference") for z in (q, k))
        sdpa = seen is not None or getattr(self, "use_sdpa", False)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if sdpa else self.scale)
        if sdpa and getattr(self, "is_causal", False):
            seen = torch.ones(scores.shape[-2:]).tril().bool()
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class ijepa:
    class Attention(Plain):
        def forward(self, x):
            return self.run(x), torch.zeros(1)  # in the place of the map


class jepa:
    class Attention(Plain):
        def forward(self, x, mask=None):
            return self.run(x), None


def places(T: int, H: int, W: int, side: int) -> Tensor:
    """Of H x W patches in each of T frames, as places in a grid of side x side."""
    step = side // H, side // W
    return torch.tensor(
        [
            (t * side + h * step[0]) * side + w * step[1]
            for t in range(T)
            for h in range(H)
            for w in range(W)
        ]
    )


class vjepa2:
    class Attention(Plain):
        def forward(self, x, mask=None, attn_mask=None):
            return self.run(x, attn_mask)

    class RoPEAttention(Plain):
        def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
            height, width = H_patches or self.grid_size, W_patches or self.grid_size
            return self.run(x, attn_mask, Rope3d((9, height, width), mask))

    class ACRoPEAttention(Plain):
        def forward(
            self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0
        ):  # fmt: skip
            side = self.grid_size
            frames = places(T, H, W, side).view(T, H * W) if mask is None else mask
            if action_tokens:
                first = torch.arange(T)[:, None].expand(T, action_tokens) * side * side
                frames = torch.cat((first, frames), dim=1).flatten()
            elif mask is None:
                frames = frames.flatten()
            return self.run(x, attn_mask, Rope3d((9, side, side), frames))

    class CrossAttention(nn.Module):
        def __init__(self, dim: int = 64, heads: int = 2, use_sdpa: bool = True) -> None:
            super().__init__()
            self.num_heads, self.use_sdpa, self.scale = heads, use_sdpa, 0.3
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

        def forward(self, q, x):
            q = self.q(q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.use_sdpa else self.scale)
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def frame_causal(frames: int, tokens: int) -> Tensor:
    frame = torch.arange(frames * tokens) // tokens
    return frame[:, None] >= frame


V2 = {"use_sdpa": True, "is_causal": False}
GRID = {"grid_size": 4, **V2}
KEPT = torch.stack(
    [torch.randperm(48, generator=torch.Generator().manual_seed(n))[:10] for n in (0, 1)]
)
WHOLE = {"T": 3, "H_patches": 2, "W_patches": 4}
ACTIONS = {"T": 3, "H": 4, "W": 4, "action_tokens": 2}
# name: (class, settings, tokens, arguments)
CASES = {
    "ijepa": (ijepa.Attention, {}, 9, {}),
    "jepa": (jepa.Attention, {"use_sdpa": True}, 9, {}),
    "jepa, no sdpa": (jepa.Attention, {"use_sdpa": False}, 9, {"mask": "ignored"}),
    "vjepa2": (vjepa2.Attention, V2, 9, {"mask": False}),
    "vjepa2, no sdpa": (vjepa2.Attention, {**V2, "use_sdpa": False}, 9, {}),
    "vjepa2, causal": (vjepa2.Attention, {**V2, "is_causal": True}, 9, {}),
    "vjepa2, mask": (vjepa2.Attention, V2, 9, {"attn_mask": torch.arange(9)[None] < 7}),
    "rope": (vjepa2.RoPEAttention, GRID, 32, {}),
    "rope, no sdpa": (vjepa2.RoPEAttention, {**GRID, "use_sdpa": False}, 32, {}),
    "rope, not square": (vjepa2.RoPEAttention, GRID, 24, WHOLE),
    "rope, places": (vjepa2.RoPEAttention, GRID, 10, {"mask": KEPT}),
    "rope, places and grid": (vjepa2.RoPEAttention, GRID, 10, {"mask": KEPT // 2, **WHOLE}),
    "actions": (vjepa2.ACRoPEAttention, GRID, 54, ACTIONS),
    "actions, frames": (
        vjepa2.ACRoPEAttention, GRID, 54, {**ACTIONS, "attn_mask": frame_causal(3, 18)}
    ),
    "actions, half the rows": (vjepa2.ACRoPEAttention, GRID, 30, {**ACTIONS, "H": 2}),
    "no actions": (vjepa2.ACRoPEAttention, GRID, 48, {**ACTIONS, "action_tokens": 0}),
    "no actions, places": (
        vjepa2.ACRoPEAttention, GRID, 10, {**ACTIONS, "action_tokens": 0, "mask": KEPT}
    ),
}  # fmt: skip


def first(out: Any) -> tuple[Tensor, ...]:
    return (out[0] if isinstance(out, tuple) else out,)


@pytest.mark.parametrize("name", CASES)
def test_modules(name):
    cls, settings, tokens, arguments = CASES[name]
    module, x = cls(**settings), torch.randn(2, tokens, 64)
    fused = fuse(copy.deepcopy(module))
    assert isinstance(fused(x, **arguments), tuple) == isinstance(module(x, **arguments), tuple)
    fused_models.assert_same(module, fused, lambda m: first(m(x, **arguments)))


@pytest.mark.parametrize("sdpa", [True, False])
def test_cross_attention(sdpa):
    module, q, x = (
        vjepa2.CrossAttention(use_sdpa=sdpa),
        torch.randn(2, 1, 64),
        torch.randn(2, 7, 64),
    )
    fused = fuse(copy.deepcopy(module))
    fused_models.assert_same(module, fused, lambda m: (m(q, x),))


def test_dropout():
    """sdpa drops attention by proj_drop_prob, in eval too; without it by attn_drop, in training."""
    module = jepa.Attention(use_sdpa=True, proj_drop_prob=0.1)
    with pytest.raises(ValueError, match=r"proj_drop_prob is 0\.1"):
        fuse(module.eval())
    fuse(jepa.Attention(use_sdpa=False, proj_drop_prob=0.1))
    with pytest.raises(ValueError, match=r"proj_drop_prob is 0\.1"):
        fuse(vjepa2.Attention(**{**V2, "use_sdpa": False}, proj_drop_prob=0.1))
    module, x = ijepa.Attention(attn_drop=nn.Dropout(0.1)), torch.randn(2, 5, 64)
    with pytest.raises(ValueError, match=r"attn_drop is 0\.1 in training"):
        fuse(module)
    fuse(module.eval())(x)
    with pytest.raises(ValueError, match=r"attn_drop: attn_drop is 0\.1 in training"):
        module.train()(x)


def test_another_class_of_the_same_name_is_left():
    """Many a ViT has an Attention; one look tells them apart."""

    def of(forward: Any) -> nn.Module:
        return type("Attention", (Plain,), {"forward": forward})()

    def fails(self: Any, x: Tensor) -> Tensor:
        raise KeyError("no")

    model = nn.ModuleDict(
        {
            "fused": ijepa.Attention(),
            "no map": of(lambda self, x: self.run(x)),
            "other scale": of(lambda self, x: (self.run(x * 2), None)),
            "fails": of(fails),
            "more": of(lambda self, x, more: (self.run(x), None)),
            "narrow": ijepa.Attention(heads=16),
            "turns": vjepa2.RoPEAttention(**GRID),
            "turns otherwise": type(
                "RoPEAttention",
                (Plain,),
                {"forward": axial},
            )(**GRID),
        }
    )
    fuse(model)
    found = report(model)
    assert found.fused == ("fused", "turns")
    another = "something else than the class of that name that is known"
    assert found.left == {
        "no map": f"Attention returns {another}",
        "other scale": f"Attention computes {another}",
        "fails": "Attention raised KeyError on a few tokens: 'no'",
        "more": "Attention is not among the classes that are fused",
        "narrow": "its head dim is 4, attention takes a multiple of 8 from 16 to 128",
        "turns otherwise": f"RoPEAttention computes {another}",
    }


def axial(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
    grid = (9, H_patches or self.grid_size, W_patches or self.grid_size)
    return self.run(x, attn_mask, Rope3d(grid, mask, layout="axial"))


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (vjepa2.RoPEAttention, {}, "x: got 24 tokens, takes 16, those of its grid"),
        (vjepa2.RoPEAttention, {**WHOLE, "T": 2}, "x: got 24 tokens, takes 16"),
        (vjepa2.RoPEAttention, {"mask": KEPT}, "mask: got shape"),
        (vjepa2.RoPEAttention, {"mask": KEPT - 9}, "mask: got places -"),
        (vjepa2.RoPEAttention, {"mask": KEPT.float()}, "mask: got dtype"),
        (vjepa2.ACRoPEAttention, {**ACTIONS, "action_tokens": 0, "mask": KEPT}, "mask: got shape"),
        (vjepa2.ACRoPEAttention, {**ACTIONS, "H": 3}, "H: got 3, takes a divisor of grid_size 4"),
        (vjepa2.ACRoPEAttention, {**ACTIONS, "mask": KEPT}, "mask: got one with 2 action tokens"),
        (vjepa2.ACRoPEAttention, {}, "T, H, W: got None, None, None, takes three ints"),
        (vjepa2.Attention, {"attn_mask": torch.ones(24, 24).triu().bool()}, "attn_mask: got one"),
    ],
)
def test_refused(cls, arguments, message):
    module = fuse(cls(**GRID))
    with pytest.raises((ValueError, TypeError), match=message):
        module(torch.randn(2, 24, 64), **arguments)


def test_places_of_many_frames():
    """Without a number of frames there are as many as a long video has; no more are looked up."""
    module = vjepa2.RoPEAttention(**GRID)
    fused, x = fuse(copy.deepcopy(module)), torch.randn(1, 3, 64)
    last = 4096 * 16 - 1
    places, fewer = torch.tensor([[0, last - 16, last]]), torch.tensor([[0, 15, 31]])
    with torch.no_grad():
        near = module(x, fewer)
        assert not torch.allclose(fused(x, places), near, atol=1e-3), "far frames turn otherwise"
        theirs = module.run(x, None, Rope3d((4096, 4, 4), places))
    # cosines of angles in the thousands, in float32
    torch.testing.assert_close(fused(x, places), theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=f"mask: got places 0 to {last + 1}, takes 0 to {last}"):
        fused(x, places.clamp_min(0) + torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="mask: got places 0 to 32, takes 0 to 31"):
        fused(x, fewer + torch.tensor([0, 0, 1]), T=2)


@pytest.mark.thorough  # 3 CPU-seconds, most of them torch.compile's imports
def test_torch_compile():
    """One graph, with places too."""
    module, x = fuse(vjepa2.RoPEAttention(**GRID)), torch.randn(2, 10, 64)
    expected = module(x, KEPT)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, KEPT), expected, **CLOSE)


def test_a_target_encoder():
    """A deep copy of a fused encoder, moved after it: its own weights; and back again."""
    encoder, x = nn.Sequential(vjepa2.RoPEAttention(**GRID)), torch.randn(2, 16, 64)
    attributes = [set(module.__dict__) for module in encoder.modules()]
    before = encoder(x)
    target = copy.deepcopy(fuse(fuse(encoder)))
    with torch.no_grad():
        for z in encoder.parameters():
            z.add_(0.1)
    torch.testing.assert_close(target(x), before, **CLOSE)
    vk.ema_update_(list(target.parameters()), list(encoder.parameters()), 0.0)
    torch.testing.assert_close(target(x), encoder(x), **CLOSE)
    twin = pickle.loads(pickle.dumps(target))
    assert unfuse(encoder) is encoder
    assert [set(module.__dict__) for module in encoder.modules()] == attributes
    torch.testing.assert_close(unfuse(twin)(x), encoder(x), **CLOSE)
    with pytest.raises(ValueError, match="model: got Sequential that is not fused"):
        unfuse(encoder)


# --- the repositories' own models ---


def masks_of(count: int) -> tuple[Tensor, Tensor]:
    order = torch.stack([torch.randperm(count) for _ in range(2)])
    return order[:, :20].sort().values, order[:, 20:50].sort().values


def published() -> dict[str, Any]:
    """name: (model, run) of the repository that is on the path; skips where there is none."""
    try:
        vits = importlib.import_module("src.models.vision_transformer")
    except ImportError as error:
        pytest.skip(f"needs ijepa, jepa or vjepa2 on the path: {error}")
    small = {"embed_dim": 128, "depth": 2, "num_heads": 2}
    predictor = {"embed_dim": 128, "predictor_embed_dim": 64, "depth": 2, "num_heads": 2}
    (context, target), z = masks_of(64), torch.randn(2, 20, 128)
    if hasattr(vits, "VisionTransformerPredictor"):
        images = torch.randn(2, 3, 64, 64)
        encoder = vits.VisionTransformer(img_size=[64], patch_size=8, **small)
        return {
            "encoder": (encoder, lambda m: (m(images),)),
            "encoder, kept": (encoder, lambda m: (m(images, [context]),)),
            "predictor": (
                vits.VisionTransformerPredictor(64, **predictor),
                lambda m: (m(z, [context], [target]),),
            ),
        }
    predictors = importlib.import_module("src.models.predictor")
    poolers = importlib.import_module("src.models.attentive_pooler")
    videos = torch.randn(2, 3, 8, 64, 64)
    second = "use_rope" in inspect.signature(vits.VisionTransformer.__init__).parameters
    side = (64, 64) if second else 64
    grid = {"img_size": side, "patch_size": 16, "num_frames": 8, "tubelet_size": 2}
    cases: dict[str, Any] = {
        "classifier": (
            poolers.AttentiveClassifier(embed_dim=128, num_heads=2, depth=2 if second else 1),
            lambda m: (m(z),),
        )
    }
    kinds: list[dict[str, Any]] = [{}]
    if second:
        kinds = [{"use_rope": True}, {"use_rope": True, "use_sdpa": False}, {"use_rope": False}]
        kinds.append({"use_rope": True, "handle_nonsquare_inputs": False})
        kinds.append({"use_rope": True, "use_activation_checkpointing": True})
    for kind in kinds:
        encoder = vits.VisionTransformer(**grid, **small, **kind)
        cases[f"encoder {kind}"] = (encoder, lambda m: (m(videos),))
        cases[f"encoder {kind}, kept"] = (
            encoder,
            lambda m: (m(videos, [context, target[:, :20]]),),
        )
    make = predictors.VisionTransformerPredictor
    if not second:
        teacher = torch.randn(2, 30, 128)
        model = make(**grid, **predictor, use_mask_tokens=True)
        cases["predictor"] = (model, lambda m: tuple(m(z, teacher, [context], [target])))
        return cases
    for rope in (True, False):
        model = make(**grid, **predictor, use_mask_tokens=True, use_rope=rope)
        cases[f"predictor, rope {rope}"] = (model, lambda m: (m(z, [context], [target]),))
    acs = importlib.import_module("src.models.ac_predictor")
    tokens, moves = torch.randn(2, 64, 128), [torch.randn(2, 4, n) for n in (7, 7, 6)]
    for extrinsics in (False, True):
        model = acs.VisionTransformerPredictorAC(**grid, **predictor, use_extrinsics=extrinsics)
        cases[f"AC, {extrinsics}"] = (model, lambda m: (m(tokens, *moves),))
    return cases


def test_the_published_models():
    """Every attention module is fused; outputs and gradients are those of the model itself."""
    with timm_alone.importable():
        for name, (model, run) in published().items():
            for parameter, z in model.named_parameters():
                if "qkv.weight" in parameter or "kv.weight" in parameter:
                    nn.init.normal_(z, std=0.1)
            fused = fuse(copy.deepcopy(model))
            assert report(fused).left == {}, name
            fused_models.assert_same(model, fused, run)
