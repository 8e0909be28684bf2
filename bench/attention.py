"""Masked attention and rotary position against scaled_dot_product_attention and its kin.

Every contender of a case works on the same kept tokens, each from the layout that suits it: packed
[total, H, d] for ours, the loop and varlen_attn, padded or whole [B, H, T, d] for the others. The
masks and cosines of the baselines are made outside the step. Floors count 4 T T d operations
forward and 10 backward a head, over the pairs that the rule lets through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Plan, Step
from bench.measure import compiled
from vicreg_kernels.attention import (
    Blocks,
    FrameCausal,
    KeyPadding,
    Ragged,
    Rope3d,
    apply_rope,
    contract,
    masked_attention,
)
from vicreg_kernels.core import dispatch

TITLE = "Attention, forward and backward, by configuration, tokens kept and head dim"
CONTENDERS = {
    "sdpa_mask": "SDPA, all tokens, boolean mask",
    "sdpa_loop": "SDPA, a loop over samples",
    "sdpa_padded": "SDPA, padded to the longest",
    "sdpa": "SDPA without a mask",
    "rope_sdpa": "eager rotary, then SDPA",
    "flex_attention": "FlexAttention, compiled",
    "varlen_attn": "torch's varlen_attn",
}

# The grids of the published video and image configurations.
VIDEO = (8, 14, 14)
VIDEO_2 = (8, 16, 16)


@dataclass(frozen=True)
class Setting:
    """What a case computes. batch, heads: device type -> how many.

    kept: least and most tokens of a sample, spread evenly over the batch. grid: all tokens of a
    sample, of which `kept` are; rope: whether they are turned by their place in it. frame: tokens a
    frame where the rule is frame-causal.
    """

    label: str
    batch: dict[str, int]
    heads: dict[str, int]
    dim: int
    kept: tuple[int, int]
    grid: tuple[int, ...] = ()
    rope: bool = False
    frame: int = 0
    forward: bool = False

    @property
    def tokens(self) -> int:
        total = 1
        for edge in self.grid or self.kept[1:]:
            total *= edge
        return total

    @property
    def name(self) -> str:
        least, most = self.kept
        kept = f"{most}" if least == most else f"{least}-{most}"
        whole = f"of{self.tokens}" if self.tokens != most else ""
        rope = "_rope" if self.rope else ""
        forward = "_forward" if self.forward else ""
        return f"{self.label}_{kept}{whole}_d{self.dim}{rope}{forward}"

    def lengths(self, batch: int) -> list[int]:
        least, most = self.kept
        return [least + (most - least) * i // max(batch - 1, 1) for i in range(batch)]


def rotate_eagerly(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [..., T, d] turned in V-JEPA 2's order; cosine, sine: [T, rotated], made once."""
    turned, rest = x.split([cosine.shape[-1], x.shape[-1] - cosine.shape[-1]], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    partner = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.cat((turned * cosine + partner * sine, rest), dim=-1)


def angles(rope: Rope3d, index: Tensor, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine, sine) [..., rotated] of places [...], in like's dtype."""
    _, height, width = rope.grid
    axes = (index // (width * height), index // width % height, index % width)
    angle = torch.cat([rope.angles(axis.double(), dim) for axis in axes[3 - rope.axes :]], dim=-1)
    return angle.cos().to(like), angle.sin().to(like)


class Inputs:
    """The tokens of a setting in every layout that a contender takes."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype) -> None:
        self.setting = setting
        self.batch = setting.batch[device.type]
        self.heads = setting.heads[device.type]
        self.lengths = setting.lengths(self.batch)
        self.longest = max(self.lengths)
        self.ragged = min(self.lengths) != self.longest
        self.offsets = torch.tensor([0, *self.lengths], device=device).cumsum(0).int()
        keep = torch.zeros(self.batch, setting.tokens, dtype=torch.bool)
        for row, length in zip(keep, self.lengths, strict=True):
            row[torch.randperm(setting.tokens)[:length]] = True
        self.keep = keep.to(device)
        # places of the kept tokens in the grid, packed; padded ones repeat place 0
        self.places = self.keep.nonzero()[:, 1]
        at = torch.arange(self.longest, device=device)
        self.real = at < torch.tensor(self.lengths, device=device)[:, None]  # [B, longest]
        self.padded_places = torch.zeros_like(self.real, dtype=torch.long)
        self.padded_places[self.real] = self.places
        self.rope = Rope3d(setting.grid, self.places) if setting.rope else None
        self.device, self.dtype = device, dtype

    def draw(self, *shape: int) -> tuple[list[Tensor], Tensor]:
        """(q, k, v wanting gradients, an incoming gradient)."""
        *leaves, grad = (torch.randn(shape, device=self.device).to(self.dtype) for _ in range(4))
        return [x.requires_grad_() for x in leaves], grad

    def packed(self) -> tuple[list[Tensor], Tensor]:
        return self.draw(sum(self.lengths), self.heads, self.setting.dim)

    def rows(self, tokens: int) -> tuple[list[Tensor], Tensor]:
        return self.draw(self.batch, self.heads, tokens, self.setting.dim)

    def step(self, function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Step:
        if self.setting.forward:

            def forward() -> Tensor:
                with torch.no_grad():
                    return function(*leaves)

            return forward
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        frame = self.setting.frame
        if not frame:
            return sum(n * n for n in self.lengths)
        return sum(min(n, (i // frame + 1) * frame) for n in self.lengths for i in range(n))


def ours(x: Inputs, backend: str | None) -> tuple[Step, str]:
    setting = x.setting
    mask: Any = FrameCausal(setting.frame) if setting.frame else None
    rope = x.rope
    if x.ragged:
        ragged = Ragged(x.offsets, max_length=x.longest)
        mask = ragged if mask is None else ragged & mask
        leaves, grad = x.packed()
        like = leaves[0].transpose(0, 1).unsqueeze(0)
    else:
        leaves, grad = x.rows(x.longest)
        like = leaves[0]
        if rope is not None:
            rope = Rope3d(setting.grid, x.padded_places)
    why = contract.cannot_run(like.dtype, x.longest)
    name = dispatch.choose("attention", backend, like.device.type, like.dtype, cannot_run=why)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, mask=mask, rope=rope, backend=backend)

    return x.step(attend, leaves, grad), name


def sdpa_mask(x: Inputs) -> Step:
    """All tokens of the grid, and a mask: of kept keys, or of earlier frames."""
    tokens = x.setting.tokens
    mask = x.keep[:, None, None]
    if x.setting.frame:
        frames = torch.arange(tokens, device=mask.device) // x.setting.frame
        mask = frames[:, None] >= frames[None, :]
    return x.step(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), *x.rows(tokens)
    )


def loop(x: Inputs, rotate: bool) -> Step:
    """One call a sample, packed tokens in and out."""
    ends = x.offsets.tolist()
    leaves, grad = x.packed()
    if rotate:
        assert x.rope is not None
        cosine, sine = angles(x.rope, x.places, x.setting.dim, leaves[0])
        cosine, sine = cosine[:, None], sine[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if rotate:
            q, k = rotate_eagerly(q, cosine, sine), rotate_eagerly(k, cosine, sine)
        outputs = []
        for begin, end in pairwise(ends):
            rows = (t[begin:end].transpose(0, 1)[None] for t in (q, k, v))
            outputs.append(F.scaled_dot_product_attention(*rows)[0].transpose(0, 1))
        return torch.cat(outputs)

    return x.step(attend, leaves, grad)


def padded(x: Inputs, rotate: bool) -> Step:
    """All samples as long as the longest; where they differ, a mask of the real keys."""
    mask = x.real[:, None, None] if x.ragged else None
    if x.setting.frame:
        frames = torch.arange(x.longest, device=x.real.device) // x.setting.frame
        mask = frames[:, None] >= frames[None, :]
    leaves, grad = x.rows(x.longest)
    if rotate:
        rope = Rope3d(x.setting.grid)
        cosine, sine = angles(rope, x.padded_places, x.setting.dim, leaves[0])
        cosine, sine = cosine[:, None], sine[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if rotate:
            q, k = rotate_eagerly(q, cosine, sine), rotate_eagerly(k, cosine, sine)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return x.step(attend, leaves, grad)


def flex(x: Inputs) -> Step:
    """Compiled FlexAttention with the rule as its block mask, made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not x.ragged:
        leaves, grad = x.rows(x.longest)
        blocks = None
        if x.setting.frame:
            frame, edge = x.setting.frame, x.longest

            def earlier(b: Any, h: Any, i: Any, j: Any) -> Any:
                return i // frame >= j // frame

            blocks = create_block_mask(earlier, None, None, edge, edge, device=x.device)
    else:
        total = sum(x.lengths)
        leaves, grad = x.draw(1, x.heads, total, x.setting.dim)
        sample = torch.repeat_interleave(
            torch.arange(x.batch, device=x.offsets.device), x.offsets.diff()
        )

        def same(b: Any, h: Any, i: Any, j: Any) -> Any:
            return sample[i] == sample[j]

        blocks = create_block_mask(same, None, None, total, total, device=x.device)
    attend = compiled(flex_attention)
    return x.step(lambda q, k, v: attend(q, k, v, block_mask=blocks), leaves, grad)


def varlen(x: Inputs) -> Step:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = x.offsets, x.longest
    return x.step(
        lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest), *x.packed()
    )


def case(
    setting: Setting,
    targets: dict[str, dict[str, float]],
    dtypes: dict[str, tuple[str, ...]] | None = None,
    **more: Any,
) -> Case:
    def build(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
        x = Inputs(setting, device, dtype)
        step, name = ours(x, backend)
        steps = {"ours": step}
        skipped: dict[str, str] = {}
        cuda = device.type == "cuda"
        if setting.rope:
            steps["rope_sdpa"] = loop(x, True) if x.ragged and not cuda else padded(x, True)
        else:
            if x.ragged or setting.frame:
                steps["sdpa_mask"] = sdpa_mask(x)
            if x.ragged and not cuda:
                steps["sdpa_loop"] = loop(x, False)
            elif x.ragged:
                steps["sdpa_padded"] = padded(x, False)
            elif not setting.frame:
                steps["sdpa"] = padded(x, False)
            builders: list[tuple[str, Callable[[Inputs], Step]]] = [("flex_attention", flex)]
            if not setting.frame:
                builders.append(("varlen_attn", varlen))
            for contender, build_ in builders:
                if not cuda:
                    skipped[contender] = "runs on CUDA tensors"
                    continue
                try:
                    steps[contender] = build_(x)
                except (ImportError, RuntimeError) as error:
                    skipped[contender] = str(error).splitlines()[0]
        elements = sum(x.lengths) * x.heads * setting.dim
        streams, products = (4, 4) if setting.forward else (8, 14)
        return Plan(
            steps=steps,
            backend=name,
            least_bytes=streams * elements * dtype.itemsize,
            least_operations=products * x.pairs() * setting.dim * x.heads,
            compiled=("flex_attention",) if "flex_attention" in steps else (),
            skipped=skipped,
        )

    if dtypes is not None:
        more["dtypes"] = dtypes
    return Case(setting.name, build, targets, **more)


def on(cpu: int, cuda: int) -> dict[str, int]:
    return {"cpu": cpu, "cuda": cuda}


GPU_ONLY: dict[str, tuple[str, ...]] = {"cuda": ("bfloat16",)}
SHORT = {"flex_attention": 1.2, "varlen_attn": 1.0, "sdpa": 1.0}
CASES = {
    one.name: one
    for one in (
        # V-JEPA's second mask: what a batch keeps before it is cut to its shortest sample
        case(
            Setting("vjepa", on(4, 24), on(6, 16), 64, (111, 303), VIDEO),
            {
                "cpu": {"sdpa_mask": 3.0, "sdpa_loop": 1.2},
                "cuda": {"flex_attention": 1.2, "varlen_attn": 1.0, "sdpa_padded": 1.0},
            },
            quick=True,
        ),
        # V-JEPA 2-AC: 256 tokens of a frame, an action and a state
        case(
            Setting("vjepa2ac", on(1, 8), on(16, 16), 64, (1806, 1806), frame=258),
            {"cpu": {"sdpa_mask": 1.4}, "cuda": {"sdpa_mask": 1.4, "flex_attention": 1.0}},
            quick=True,
        ),
        case(
            Setting("vjepa", on(4, 24), on(6, 16), 64, (302, 302), VIDEO, rope=True),
            {"cpu": {"rope_sdpa": 1.5}, "cuda": {"rope_sdpa": 1.5}},
            quick=True,
        ),
        case(
            Setting("vjepa", on(4, 24), on(6, 16), 64, (111, 303), VIDEO, rope=True),
            {"cpu": {"rope_sdpa": 1.5}, "cuda": {"rope_sdpa": 1.5}},
        ),
        case(Setting("vjepa", on(2, 24), on(6, 16), 64, (382, 602), VIDEO), {"cuda": SHORT}),
        case(
            Setting("ijepa_vith", on(8, 128), on(16, 16), 80, (69, 69), (16, 16)), {"cuda": SHORT}
        ),
        case(
            Setting("ijepa_vith", on(8, 128), on(16, 16), 80, (69, 110), (16, 16)), {"cuda": SHORT}
        ),
        case(Setting("ijepa_vitg", on(8, 128), on(16, 16), 88, (58, 58), (14, 14)), {}),
        case(Setting("predictor", on(8, 128), on(12, 12), 32, (256, 256)), {"cuda": SHORT}),
        case(
            Setting("vjepa2_vitg", on(1, 24), on(4, 22), 64, (120, 381), VIDEO_2), {"cuda": SHORT}
        ),
        case(
            Setting("vjepa2_vitg", on(1, 24), on(4, 22), 64, (2048, 2048), VIDEO_2, rope=True),
            {"cuda": {"rope_sdpa": 1.5}},
        ),
        case(Setting("dense", on(1, 16), on(4, 16), 64, (2048, 2048)), {}),
        case(
            Setting("dense", on(1, 16), on(4, 16), 64, (2048, 2048), forward=True),
            {"cuda": {"sdpa": 0.5}},
        ),
        # longer videos, where only the kept tokens fit a benchmark's time
        case(
            Setting("vjepa2_64frames", on(1, 12), on(1, 16), 64, (792, 1555), (32, 16, 16)),
            {},
            GPU_ONLY,
        ),
    )
}


def exercise(backend: str, device: str) -> int:
    """Runs every kernel on small shapes that no tile divides; how many results are not finite."""
    bad = 0
    dtypes = (torch.float32, torch.bfloat16) if backend != "cuda" else (torch.bfloat16,)
    for dtype in dtypes:
        for tokens, dim, mask in (
            (67, 40, None),
            (131, 64, FrameCausal(13, 3)),
            (99, 80, Blocks(31, [20, 17])),
            (45, 32, KeyPadding([45, 7])),
            (71, 128, KeyPadding(torch.rand(2, 71).to(device) < 0.5)),
        ):
            rope = Rope3d((5, 5, 6))
            q, k, v = (
                torch.randn(2, tokens, 3, dim, device=device).to(dtype).transpose(1, 2)
                for _ in range(3)
            )
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = masked_attention(*leaves, mask=mask, rope=rope, backend=backend)
            results = (out, *torch.autograd.grad(out.float().square().sum(), leaves))
            if backend != "cuda" or tokens == 67:
                results += (apply_rope(q, rope, backend=backend),)
            bad += sum(not result.isfinite().all().item() for result in results)
        packed = [torch.randn(150, 2, 48, device=device).to(dtype).requires_grad_()] * 3
        ragged = Ragged(torch.tensor([0, 0, 31, 150], device=device))
        out = masked_attention(*packed, mask=ragged, backend=backend)
        (grad,) = torch.autograd.grad(out.float().sum(), packed[0])
        bad += sum(not result.isfinite().all().item() for result in (out, grad))
    return bad
