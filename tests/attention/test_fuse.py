"""What the integrations have in common: which modules are compared before they are fused, and how;
and how long the reading of a mask is kept.
"""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.attention.test_meta_jepa import Plain, ijepa, vjepa2
from vicreg_kernels.attention import FrameCausal
from vicreg_kernels.integrations import masks, modules
from vicreg_kernels.integrations.meta_jepa import fuse, report

ANOTHER = "Attention computes something else than the class of that name that is known"


def attention(forward: Any, **settings: Any) -> nn.Module:
    """Of a foreign class that is called as ijepa's."""
    return type("Attention", (Plain,), {"forward": forward})(**settings)


class Foreign(Plain):
    """ijepa's own, with what the settings `kind`, `sizes`, `extra` and `table` add."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        out = self.run(x)
        for more in (self.kind == "twice", self.sizes[0] == 2, self.extra is not None):
            out = out * 2 if more else out
        return out * self.table, None


Foreign.__name__ = "Attention"


def foreign(**settings: Any) -> nn.Module:
    module = Foreign(**{"kind": "once", "sizes": (1,), **settings})
    module.register_parameter("extra", None)
    module.register_buffer("table", torch.ones(1))
    return module


def with_parameter() -> nn.Module:
    module = foreign()
    module.extra = nn.Parameter(torch.ones(3))
    return module


def with_buffer() -> nn.Module:
    module = foreign()
    module.table.fill_(2)
    return module


OTHERS = {
    "a string": lambda: foreign(kind="twice"),
    "a tuple": lambda: foreign(sizes=(2,)),
    "a parameter in the place of None": with_parameter,
    "the values of a buffer": with_buffer,
}


@pytest.mark.parametrize("name", OTHERS)
def test_each_of_other_settings_is_compared(name):
    model = nn.ModuleDict({"one": foreign(), "alike": foreign(), "other": OTHERS[name]()})
    assert report(fuse(model)).fused == ("one", "alike")
    assert report(model).left == {"other": ANOTHER}


def test_those_alike_are_compared_once(monkeypatch):
    compared = []
    own = modules._differs
    count = lambda module, kind: (compared.append(module), own(module, kind))[1]  # noqa: E731
    monkeypatch.setattr(modules, "_differs", count)
    left = attention(lambda self, x: (self.run(x * 2), None))
    model = nn.Sequential(*(ijepa.Attention() for _ in range(3)), ijepa.Attention(dim=32), left)
    fuse(model)
    assert len(compared) == 3, "two settings of a class and another class, in one survey"


@pytest.mark.parametrize("training", [True, False])
def test_dropout_that_the_class_adds_is_not_lost(training):
    """Also where the model is fused in eval and trained later."""

    def drops(self: Any, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.dropout(self.run(x), 0.5, self.training), None

    with pytest.raises(ValueError, match=ANOTHER):
        fuse(attention(drops).train(training))


def test_dropout_of_the_output_is_known():
    """Both drop the same; the generator of the CPU is left as it was."""
    module = ijepa.Attention(proj_drop=nn.Dropout(0.5)).train()
    before = torch.random.get_rng_state()
    fuse(module)
    assert torch.equal(torch.random.get_rng_state(), before)
    x = torch.randn(2, 5, 64)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = module(x)[0]
        torch.manual_seed(3)
        torch.testing.assert_close(found, type(module).forward(module, x)[0])


class Bare(nn.Module):
    """Of the name and parameters alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


Bare.__name__ = "Attention"


class Half(Bare):
    """What `cannot` looks at, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.num_heads, self.use_sdpa = nn.Linear(64, 192), 2, True


Half.__name__ = "RoPEAttention"
Half.forward = vjepa2.RoPEAttention.forward


def test_a_class_without_the_attributes_is_left():
    model = nn.ModuleDict({"fused": ijepa.Attention(), "bare": Bare(), "part": Half()})
    assert report(fuse(model)).fused == ("fused",)
    left = report(model).left
    cannot = "cannot be compared with the class that is known: AttributeError:"
    assert left["bare"].startswith(f"Attention {cannot} 'Attention' object has no attribute 'qkv'")
    assert left["part"].startswith(f"RoPEAttention {cannot}")
    assert "grid_size" in left["part"]


def test_hooks_do_not_see_the_comparison():
    module, seen = ijepa.Attention(), []
    module.qkv.register_forward_hook(lambda *args: seen.append(args))
    module.qkv.register_forward_pre_hook(lambda *args: seen.append(args))
    fuse(module)
    assert seen == []
    module(torch.randn(2, 5, 64))
    assert len(seen) == 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_what_cannot_be_copied_is_left():
    model = nn.ModuleDict({"fused": ijepa.Attention(), "normed": ijepa.Attention()})
    nn.utils.weight_norm(model["normed"].qkv)
    assert report(fuse(model)).fused == ("fused",)
    assert "RuntimeError: Only Tensors created explicitly" in report(model).left["normed"]
    model["normed"](torch.randn(2, 5, 64))


@pytest.mark.parametrize("cls", [ijepa.Attention, vjepa2.RoPEAttention])
def test_another_default_device(cls):
    settings = {"grid_size": 4, "use_sdpa": True, "is_causal": False}
    with torch.device("meta"):
        module = fuse(cls(**settings if cls is vjepa2.RoPEAttention else {}))
    assert report(module).fused == ("",)


# --- masks ---


def read(mask: Tensor, frame: int = 1) -> masks.Said:
    return masks.read(mask, 2, 1, 4, 4, frame=frame)


def by_frames(frame: int) -> Tensor:
    order = torch.arange(4) // frame
    return order[:, None] >= order


def test_a_mask_is_read_once(monkeypatch):
    mask, reads = by_frames(1), []
    own = masks._read
    monkeypatch.setattr(masks, "_read", lambda *args: (reads.append(args), own(*args))[1])
    assert read(mask) is read(mask)
    assert len(reads) == 1


def test_the_size_of_a_frame_is_part_of_what_a_mask_says():
    mask = by_frames(2)
    assert isinstance(read(mask, 2).rule, FrameCausal)
    with pytest.raises(ValueError, match="differs from query to query"):
        read(mask, 1)
    whole = torch.ones(4, 4, dtype=torch.bool)
    assert read(whole, 4).rule is None
    assert read(by_frames(2), 2).rule.tokens_per_frame == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda z: pickle.loads(pickle.dumps(z))])
def test_a_copy_of_a_mask_is_read_anew(duplicate):
    """The same number of changes in place says nothing of a copy."""
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    read(mask)
    twin = duplicate(mask)
    assert not vars(twin), "nothing goes along"
    mask[..., 3], twin[..., 2] = False, False
    kept = [(z, read(z).rule.tensors.own["keep"]) for z in (mask, twin)]
    for z, keep in kept:
        assert torch.equal(keep, z[:, 0, 0])


def test_the_reading_goes_with_the_mask():
    masks._kept.clear()
    mask = by_frames(1)
    read(mask)
    assert len(masks._kept) == 1
    del mask
    gc.collect()
    assert masks._kept == {}


def test_another_mask_with_the_id_of_one_that_is_gone_is_read():
    mask = by_frames(1)
    read(mask)
    another = torch.ones(4, 4, dtype=torch.bool)
    masks._kept[id(another)] = masks._kept[id(mask)]
    assert read(another).rule is None
