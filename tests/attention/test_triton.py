"""Tier 4: attention's Triton kernels' numerics, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.attention import cases
from tests.attention.cases import draw, heads, hold
from tests.helpers import triton_interpreter
from tests.helpers.tolerances import assert_close_to_truth
from vicreg_kernels.attention import (
    Blocks,
    FrameCausal,
    KeyPadding,
    Ragged,
    Rope3d,
    apply_rope,
    masked_attention,
    masks,
    reference,
)

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
ALL = (True, True, True)
attend = partial(masked_attention, backend="triton")
# Every rule, and every combination that two or three of them can make.
COMBINED = [
    ("lengths",), ("keep",), ("ragged",), ("ragged_keys",), ("frames",), ("window",), ("blocks",),
    ("lengths", "window"), ("keep", "frames"), ("ragged_keys", "window"), ("ragged", "blocks"),
    ("lengths", "blocks"), ("keep", "blocks", "window"), ("ragged", "blocks", "frames"),
]  # fmt: skip

if triton_interpreter.INTERPRETING:
    import triton
    import triton.language as tl

    from vicreg_kernels.attention.triton import configs, rules
    from vicreg_kernels.attention.triton import launch as launchers

    @triton.jit
    def visits_kernel(
        out, keys_of, bounds, queries, blocks, frame, window,
        FRAMES: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """out[tile]: key_tiles of a tile of queries, then query_range of the tile of keys."""
        first = tl.program_id(0) * TILE
        keys = tl.load(keys_of)
        row = tl.minimum(first + tl.arange(0, TILE), queries - 1)
        begin, end, second, second_end = rules.key_intervals(
            row, keys, bounds, blocks, frame, window, FRAMES, BLOCKS
        )
        ranges = rules.key_tiles(
            begin, end, second, second_end, keys, FRAMES or BLOCKS, BLOCKS, False, TILE
        )
        last = tl.minimum(first + TILE, keys) - 1
        ranges = ranges + rules.query_range(
            first, last, queries, bounds, blocks, frame, window, FRAMES, BLOCKS
        )
        for i in range(14):
            tl.store(out + tl.program_id(0) * 14 + i, ranges[i])

    @triton.jit
    def samples_kernel(out, offsets, samples, TILE: tl.constexpr):
        sample, tile = rules.find_sample(offsets, samples, 0, tl.program_id(0), TILE)
        tl.store(out + tl.program_id(0) * 2, sample)
        tl.store(out + tl.program_id(0) * 2 + 1, tile)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 and 32, so that a few dozen tokens run every loop several times."""
    shipped = configs.nearest
    tiles = {
        "forward": (16, 32, 4, 1),
        "key_gradient": (16, 32, 4, 1),
        "query_gradient": (32, 16, 4, 1),
    }

    def change(**fields):
        changed = lambda *key: dataclasses.replace(shipped(*key), **{**tiles, **fields})  # noqa: E731
        monkeypatch.setattr(configs, "nearest", changed)

    change()
    return change


def gradients(call: cases.Call, cotangent: torch.Tensor):
    out, grads = cases.run("triton", call, cotangent)
    return out, *grads


@pytest.mark.interpreted
class TestInterpreter:
    @pytest.mark.parametrize("rules", COMBINED, ids="-".join)
    @pytest.mark.sampled(2)
    def test_rules(self, small_tiles, rules):
        hold("triton", draw(rules, batch=3, heads_=1, tokens=34, dim=16).wanting(*ALL))

    @pytest.mark.parametrize("rules", [(), ("frames",), ("window",), ("ragged_keys",)])
    @pytest.mark.parametrize(("tokens", "keys"), [(34, 18), (5, 50)], ids=str)
    @pytest.mark.sampled(3)
    def test_other_lengths_of_keys(self, small_tiles, rules, tokens, keys):
        call = draw(rules, batch=1, heads_=1, tokens=tokens, keys=keys, dim=16)
        hold("triton", call.wanting(*ALL))

    @pytest.mark.parametrize("tokens", [1, 2, 16, 17, 33])
    @pytest.mark.sampled(2)
    def test_lengths_around_the_tiles(self, small_tiles, tokens):
        hold("triton", draw(tokens=tokens, batch=1, dim=16).wanting(*ALL))

    @pytest.mark.parametrize(
        ("dim", "dtype"),
        [(d, "fp32") for d in (16, 24, 40, 56, 64, 80, 88, 104, 128)]
        + [(d, "fp16") for d in (64, 80)] + [(88, "bf16")],
    )  # fmt: skip
    @pytest.mark.sampled(2)
    def test_head_dims(self, dim, dtype):
        """With the shipped tiles."""
        dtype = HALF.get(dtype, torch.float32)
        call = draw(("frames",), batch=1, heads_=1, tokens=19, dim=dim, dtype=dtype)
        hold("triton", call.wanting(*ALL))

    @pytest.mark.parametrize("dtype", list(HALF))
    @pytest.mark.parametrize("rules", [("ragged", "window"), ("keep", "blocks")], ids="-".join)
    @pytest.mark.sampled(3)
    def test_half(self, small_tiles, rules, dtype):
        call = draw(rules, batch=2, heads_=1, tokens=20, dim=40, axes=2, dtype=HALF[dtype])
        hold("triton", call.wanting(*ALL))

    @pytest.mark.parametrize(
        ("axes", "indexed", "rope_layout"),
        [(1, False, "axial"), (1, True, "vjepa2"), (2, False, "vjepa2"), (2, True, "axial"),
         (3, False, "vjepa2"), (3, True, "vjepa2"), (3, False, "axial")],
    )  # fmt: skip
    @pytest.mark.sampled(2)
    def test_rope(self, small_tiles, axes, indexed, rope_layout):
        """Keys turned beforehand, and (turned=9) in the loop; packed with places in the sample."""
        small_tiles(turned=9 if axes == 3 else 0)
        rules = ("ragged_keys",) if axes == 2 else ("lengths",)
        call = draw(
            rules, batch=2, heads_=1, tokens=20, keys=35, dim=40 if axes == 2 else 16, axes=axes,
            indexed=indexed, rope_layout=rope_layout,
        )  # fmt: skip
        hold("triton", call.wanting(*ALL))

    def test_places_outside_the_grid_are_its_last(self):
        table = Rope3d((3, 2), layout="axial").table(16, torch.device("cpu"))
        x = heads(1, 1, 4, 16)
        index = torch.tensor([[5, 6, -1, 2**31 - 1]], dtype=torch.int32)
        out = launchers.rotate(x, table, index, None, [1, 3, 2, 2], False)
        wanted = launchers.rotate(x, table, torch.full_like(index, 5), None, [1, 3, 2, 2], False)
        assert torch.equal(out, wanted)

    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    @pytest.mark.sampled(2)
    def test_strides(self, small_tiles, layout):
        call = draw(("frames",), batch=2, tokens=18, dim=24, layout=layout)
        hold("triton", call.wanting(*ALL))

    def test_strides_of_the_output_gradient(self, small_tiles):
        call = draw(("lengths",), tokens=18, dim=16).wanting(*ALL)
        for like in (torch.ones(1, 1, 1, 1), torch.randn(18, 16, 2, 2).permute(3, 2, 0, 1)):
            hold("triton", call, like.expand(call.q.shape))

    @pytest.mark.parametrize("rules", [("blocks",), ("ragged",)], ids="-".join)
    @pytest.mark.sampled(2)
    def test_gradient_of_any_subset(self, small_tiles, rules):
        call = draw(rules, batch=2, heads_=1, tokens=18, dim=16, axes=1)
        cotangent = torch.randn(call.q.shape)
        whole = gradients(call.wanting(*ALL), cotangent)
        for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)):
            wanted = [bool(need) for need in wanted]
            out, *subset = gradients(call.wanting(*wanted), cotangent)
            assert torch.equal(out, whole[0])
            for need, got, full in zip(wanted, subset, whole[1:], strict=True):
                assert (got is not None) == need
                assert got is None or torch.equal(got, full)

    @pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
    @pytest.mark.sampled(2)
    def test_scales(self, small_tiles, scale):
        call = draw(("window",), batch=1, tokens=37, dim=16, scale=scale, size=2.0)
        hold("triton", call.wanting(*ALL))

    def test_scores_far_from_zero(self, small_tiles):
        hold("triton", draw(("keep",), batch=1, tokens=37, dim=16, size=9.0).wanting(*ALL))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_product_past_float32_leaves_no_key_out(self, small_tiles, dtype):
        cases.hold_past_float32("triton", dtype, exact=False)

    def test_log_sum_exp(self, small_tiles):
        call = draw(("lengths", "frames"), batch=3, tokens=37, dim=16)
        rules = masks.resolve(call.mask, call.q, call.k)
        none = (None, None, None, [1, 1, 1, 0])
        _, lse = launchers.forward(call.q, call.k, call.v, *rules, *none, 0.25)
        seen = reference.visible(rules, 37, 37, call.q.device)[:, None]
        scores = (call.q.double() @ call.k.double().mT * 0.25).masked_fill(~seen, -torch.inf)
        assert torch.equal(lse == -torch.inf, ~seen.any(-1).expand(lse.shape))
        expected = scores.exp().sum(-1).log2()
        torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("rule", ["lengths", "keep", "packed"])
    @pytest.mark.sampled(3)
    def test_hidden_keys_do_not_leak(self, small_tiles, rule, bad):
        """Nothing that padding hides, in a tile or beyond, changes any output or gradient."""
        k, v = heads(2, 1, 40, 16), heads(2, 1, 40, 16)
        keep = torch.zeros(2, 40, dtype=torch.bool)
        if rule == "keep":
            keep[0, ::3] = True
        else:
            keep[0, :19] = True
        mask = KeyPadding(keep if rule == "keep" else torch.tensor([19, 0]))
        q = heads(2, 1, 21, 16)
        if rule == "packed":  # the second sample has no query
            q, k, v = q[0].transpose(0, 1), *(x.flatten(0, 2)[:, None] for x in (k, v))
            mask = Ragged([0, 21, 21], [0, 19, 80])
        hidden = ~(
            keep[:, None, :, None] if rule != "packed" else torch.arange(80)[:, None, None] < 19
        )
        clean = cases.Call(q, k, v, mask).wanting(*ALL)
        cotangent = torch.randn(q.shape)
        wanted = gradients(clean, cotangent)
        poisoned = replace(clean, k=k.masked_fill(hidden, bad), v=v.masked_fill(hidden, bad))
        outcome = gradients(poisoned.wanting(*ALL), cotangent)
        for got, want in zip(outcome, wanted, strict=True):
            assert torch.equal(got, want)
        assert not outcome[2].masked_select(hidden).any()
        assert not outcome[3].masked_select(hidden).any()
        if rule != "packed":
            assert not outcome[0][1].any()  # no key: zeros, and zero gradients
            assert not outcome[1][1].any()

    def test_nan_that_is_seen_propagates(self, small_tiles):
        call = draw(("frames",), batch=1, heads_=1, tokens=40, dim=16, tokens_per_frame=8)
        for name in ("q", "k", "v"):
            x = getattr(call, name).clone()
            x[0, 0, 20, 3] = float("nan")
            poisoned = replace(call, **{name: x})
            out = attend(*poisoned.inputs, mask=call.mask)
            rows = slice(20, 21) if name == "q" else slice(16, 40)
            assert out[0, 0, rows].isnan().any(-1).all()
            assert out[0, 0, :16].isfinite().all()

    @pytest.mark.parametrize("rules", [(), ("ragged", "blocks")], ids=str)
    @pytest.mark.sampled(2)
    def test_two_runs_are_bitwise_equal(self, small_tiles, rules):
        call = draw(rules, heads_=1, tokens=20, dim=16, axes=3).wanting(*ALL)
        cotangent = torch.randn(call.q.shape)
        for a, b in zip(*(gradients(call, cotangent) for _ in range(2)), strict=True):
            assert torch.equal(a, b)

    def test_samples_in_a_row_equal_samples_in_a_batch(self, small_tiles):
        """Ragged against dense, bit for bit; with a loose bound and samples of nothing."""
        call = draw(batch=3, tokens=21, dim=16)
        dense = attend(*call.inputs)
        packed = [x.transpose(1, 2).flatten(0, 1) for x in call.inputs]
        offsets = torch.tensor([0, 0, 21, 42, 42, 63, 63])
        out = attend(*packed, mask=Ragged(offsets, max_length=5000))
        assert torch.equal(out, dense.transpose(1, 2).flatten(0, 1))

    def test_no_tokens(self):
        empty = torch.zeros(0, 2, 16, requires_grad=True)
        out = attend(empty, empty, empty, mask=Ragged([0, 0]))
        out.sum().backward()
        assert out.shape == (0, 2, 16)
        q = torch.ones(3, 2, 16, requires_grad=True)
        k = torch.zeros(0, 2, 16, requires_grad=True)
        out = attend(q, k, k, mask=Ragged([0, 3], [0, 0]))
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(q.grad, torch.zeros_like(q))

    def test_blocks_longer_than_a_sample(self, small_tiles):
        """One Blocks for all samples, the first of which ends inside a block, in a tile past the
        context: what follows are the next sample's queries.
        """
        mask = Ragged([0, 40, 90]) & Blocks(6, [20, 24])
        q, k, v = (heads(1, 1, 90, 16).squeeze(0).transpose(0, 1) for _ in range(3))
        hold("triton", cases.Call(q, k, v, mask).wanting(*ALL))

    def test_queries_without_keys_beside_others(self, small_tiles):
        """The first frame's keys are all hidden, so its queries see nothing, unlike the others."""
        keep = torch.arange(40)[None] >= 8
        mask = KeyPadding(keep) & FrameCausal(8)
        q, k, v = (heads(1, 1, 40, 16) for _ in range(3))
        out, grads = hold("triton", cases.Call(q, k, v, mask).wanting(*ALL))
        assert not out[:, :, :8].any()
        assert not grads[0][:, :, :8].any()

    @pytest.mark.parametrize("mask", [FrameCausal(2**30, 2**30), FrameCausal(1, 2**30)], ids=str)
    def test_rules_as_large_as_integers(self, small_tiles, mask):
        q, k, v = (heads(1, 1, 20, 16) for _ in range(3))
        hold("triton", cases.Call(q, k, v, mask).wanting(*ALL))

    @pytest.mark.parametrize(
        ("packed", "dtype"),
        [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
    )
    def test_apply_rope(self, packed, dtype):
        """Values and gradient; rows of more than one tile, places from an index or the sample."""
        rope = Rope3d((7, 4, 3), layout="axial")
        if not packed:
            rope = Rope3d((7, 4, 3), torch.randint(0, 84, (2, 45)))
        x = heads(2, 5, 45, 40, layout="tokens", dtype=dtype)
        settings = {}
        if packed:
            x = x.transpose(1, 2).flatten(0, 1)
            settings["offsets"] = torch.tensor([0, 45, 45, 70, 90])
        cotangent = torch.randn(x.shape).to(dtype)
        runs = []
        for backend, leaf in (
            ("triton", x), ("reference", x.double()), ("reference", x),
        ):  # fmt: skip
            leaf = leaf.detach().requires_grad_()
            out = apply_rope(leaf, rope, backend=backend, **settings)
            (grad,) = torch.autograd.grad(out, leaf, cotangent.to(leaf.dtype))
            runs.append((out.detach(), grad))
        for got, true, plain in zip(*runs, strict=True):
            assert_close_to_truth(got, true, plain, dtype, 32, "apply_rope")
        memory = runs[0][0] if packed else runs[0][0].transpose(1, 2)
        assert memory.is_contiguous()

    # The tiles themselves: which are visited, which are masked.

    @pytest.mark.parametrize("tile", [16, 32])
    @pytest.mark.parametrize(
        ("frame", "window", "bounds", "keys"),
        [
            (0, 0, None, 100), (0, 0, None, 32), (16, 0, None, 100), (7, 0, None, 90),
            (7, 3, None, 100), (32, 1, None, 100), (5, 2, None, 40), (0, 0, (20, 33, 50, 90), 100),
            (0, 0, (32, 64, 96), 100), (0, 0, (0, 40, 40, 100), 100), (0, 0, (50, 60), 55),
            (10, 2, (20, 60, 90), 100), (0, 0, (100,), 70),
        ],
        ids=str,
    )  # fmt: skip
    def test_tiles_visited_and_masked(self, tile, frame, window, bounds, keys):
        tokens = 100
        ends = None if bounds is None else torch.tensor([bounds], dtype=torch.int32)
        lengths = torch.tensor([keys], dtype=torch.int32)
        rules = masks.MaskArguments(None, None, lengths, None, ends, tokens, tokens, frame, window)
        seen = reference.visible(rules, tokens, tokens, torch.device("cpu"))[0]
        tiles = -(-tokens // tile)
        out = torch.full((tiles, 14), -1, dtype=torch.int32)
        visits_kernel[(tiles,)](
            out, lengths, lengths if ends is None else ends, tokens,
            0 if ends is None else ends.shape[1] - 1, frame, window or tokens,
            FRAMES=frame > 0, BLOCKS=ends is not None, TILE=tile,
        )  # fmt: skip
        for t, row in enumerate(out.tolist()):
            rows = seen[t * tile : (t + 1) * tile]
            covered = torch.zeros(tokens, dtype=torch.int32)
            for low, high, masked, first, whole in (row[:5], row[5:10]):
                for i in range(masked + whole):
                    start = low + i * tile
                    end = min(start + tile, high)
                    assert rows[:, start:end].any(), "a tile that no row sees is visited"
                    if first <= i < first + whole:
                        assert end == start + tile
                        assert rows[:, start:end].all(), "a tile without a mask is not seen whole"
                    covered[start:end] += 1
            assert torch.equal(covered > 0, covered == 1)
            assert (covered > 0)[rows.any(0)].all(), "a key that is seen is not visited"
            # whole tiles are not masked: all but the cut ends of what all rows see
            low, high, whole, whole_end = row[10:]
            columns = seen[:, t * tile : min((t + 1) * tile, keys)]
            if columns.shape[1] == 0:
                continue
            any_key, all_keys = columns.any(1).nonzero(), columns.all(1).nonzero()
            assert (
                (low, high) == (any_key.min(), any_key.max() + 1) if len(any_key) else low >= high
            )
            inside = all_keys[(all_keys >= low) & (all_keys < high)]
            if len(inside) and bounds is None:
                assert (whole, whole_end) == (inside.min(), inside.max() + 1)
            for i in range(max(whole, low), min(whole_end, high)):
                assert columns[i].all()

    def test_frame_causal_visits_half(self):
        """16 frames of 16 in tiles of 16: 136 of 256 tiles, none masked."""
        out = torch.zeros(16, 14, dtype=torch.int32)
        keys = torch.tensor([256], dtype=torch.int32)
        visits_kernel[(16,)](out, keys, keys, 256, 0, 16, 16, FRAMES=True, BLOCKS=False, TILE=16)
        assert out[:, 2].sum() == 0
        assert out[:, 4].sum() == 136

    @pytest.mark.parametrize("tile", [16, 64])
    @pytest.mark.sampled(2)
    def test_every_tile_of_every_sample_has_a_program(self, monkeypatch, tile):
        """More samples than are looked at together, many of them empty."""
        monkeypatch.setattr(rules, "SAMPLES", tl.constexpr(16))
        lengths = torch.randint(0, 150, (70,)) * (torch.rand(70) < 0.5)
        offsets = cases.offsets_of(lengths.tolist())
        programs = int(offsets[-1]) // tile + 70
        out = torch.full((programs, 2), -1, dtype=torch.int32)
        samples_kernel[(programs,)](out, offsets, 70, TILE=tile)
        tiles = sorted((s, t) for s, t in out.tolist() if t * tile < lengths[s])
        wanted = [(s, t) for s, n in enumerate(lengths.tolist()) for t in range(-(-n // tile))]
        assert tiles == wanted

    def test_skipped_tiles_are_not_read(self, small_tiles):
        """NaN in tiles that a rule hides whole changes nothing, forward and backward."""
        small_tiles(
            forward=(16, 16, 4, 1), key_gradient=(16, 16, 4, 1), query_gradient=(16, 16, 4, 1)
        )
        q, k, v, grad = (heads(1, 1, 64, 16) for _ in range(4))
        late, early = slice(48, 64), slice(0, 16)
        for mask, others in (
            (FrameCausal(16), slice(0, 48)),
            (Blocks(16, [16, 16, 16]), slice(0, 48)),
        ):
            clean = cases.Call(q, k, v, mask).wanting(*ALL)
            poisoned = [x.clone() for x in (q, k, v, grad)]
            for x in poisoned:
                x[:, :, late] = float("nan")
            outcome = gradients(cases.Call(*poisoned[:3], mask).wanting(*ALL), poisoned[3])
            wanted = gradients(clean, grad.index_fill(2, torch.arange(48, 64), 0.0))
            # out and dq of earlier frames, or of other blocks; dk and dv of other blocks
            assert torch.equal(outcome[0][:, :, others], wanted[0][:, :, others])
            assert torch.equal(outcome[1][:, :, others], wanted[1][:, :, others])
            if isinstance(mask, Blocks):
                for got, want in zip(outcome[2:], wanted[2:], strict=True):
                    assert torch.equal(got[:, :, 16:48], want[:, :, 16:48])
        first = [x.clone() for x in (q, grad)]
        for x in first:
            x[:, :, early] = float("nan")
        outcome = gradients(cases.Call(first[0], k, v, FrameCausal(16)).wanting(*ALL), first[1])
        for got in outcome[2:]:  # later keys are not seen by the first frame
            assert got[:, :, 16:].isfinite().all()
