"""Tier 4: the EMA's Triton kernel gives the reference's bits in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.ema import tensors as ema_tensors
from tests.ema.tensors import FUSED, LAYOUTS, ROUNDINGS, assert_matches_reference
from vicreg_kernels.ema import reference


@pytest.mark.interpreted
class TestInterpreter:
    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        from vicreg_kernels.ema.triton import launch as launcher

        monkeypatch.setattr(launcher, "BLOCK", 256)
        monkeypatch.setattr(launcher, "OTHER_BLOCK", 128)
        monkeypatch.setattr(launcher, "_tables", launcher._Tables())

    @pytest.mark.parametrize("rounding", ROUNDINGS)
    @pytest.mark.parametrize("momentum", [0.3, 0.996])
    @pytest.mark.sampled(2)
    def test_every_mix_of_dtypes(self, momentum, rounding):
        lists = ema_tensors.every_dtype([(300,)], layouts=["contiguous"])
        settings = {"rounding": rounding, "seed": 2**62 + 5, "step": 2**33 + 1}
        assert_matches_reference("triton", *lists, momentum, **settings)

    @pytest.mark.parametrize("rounding", ROUNDINGS)
    def test_layouts(self, rounding):
        lists = ([], [], [])
        for one in LAYOUTS.values():
            for other in (LAYOUTS["contiguous"], LAYOUTS["spread"]):
                for kept, make in zip(lists, (one, other, one), strict=True):
                    kept.append(ema_tensors.cast(make(3, 4, 31), torch.bfloat16))
        lists[0].append(torch.randn(()).bfloat16())
        lists[1].append(torch.randn(()).bfloat16())
        lists[2].append(torch.randn(()).bfloat16())
        assert_matches_reference("triton", *lists, 0.9, rounding=rounding, seed=1, step=1)

    def test_without_shadows_and_with_empty_tensors(self):
        shapes = [(0,), (5, 0), (600,), (1,), (2, 3)]
        lists = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
        assert_matches_reference("triton", *lists, [], 0.996)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("momentum", [0.0, 0.25, 0.996, 1.0])
    @pytest.mark.sampled(3)
    def test_momentum_and_step_in_device_memory(self, dtype, momentum):
        from vicreg_kernels.ema.triton import launch as launcher

        targets, onlines, copies = ema_tensors.every_dtype([(70,)], layouts=["contiguous"])
        value, step = torch.tensor(momentum, dtype=dtype), torch.tensor(2**40 + 3)
        mine, own = ema_tensors.again(targets), ema_tensors.again(copies)
        launcher.update_(mine, onlines, own, value, 0.5, True, 9, step, 0)
        reference.update_(targets, onlines, copies, None, value.item(), True, 9, None, step.item())
        ema_tensors.assert_same_bits(mine, targets, "targets")
        ema_tensors.assert_same_bits(own, copies, "shadows")

    @pytest.mark.parametrize("rounding", ROUNDINGS)
    def test_not_finite_overflowing_and_tiny(self, rounding):
        for bad in (float("nan"), float("inf"), -float("inf")):
            for dtype in FUSED:
                t, o = torch.randn(2, 40).to(dtype)
                t[3], o[5], t[7], o[7] = bad, bad, bad, -bad
                assert_matches_reference("triton", [t], [o], [], 0.9, rounding=rounding, step=1)
        for scale in (65504.0, 2.0**-14, 2.0**-20, 2.0**-24):
            for dtype in FUSED:
                t, o = (torch.rand(300) * scale).to(dtype), torch.rand(300) * scale * 3
                assert_matches_reference("triton", [t], [o], [], 0.7, rounding=rounding, step=1)

    def test_tables_are_kept_and_bounded(self):
        from vicreg_kernels.ema.triton import launch as launcher

        tables = launcher._tables
        t, o = torch.randn(2, 9)
        for _ in range(3):
            assert_matches_reference("triton", [t], [o], [], 0.9)
        launcher.update_([t], [o], [], None, 0.9, False, 0, None, 0)
        _, blocks, work = next(reversed(tables.recent))
        launcher.update_([t], [o], [], None, 0.9, False, 0, None, 0)
        assert tables.find(work, blocks, t.device)[0] is tables.find(work, blocks, t.device)[0]
        for k in range(40):
            row = ((("fp32", "fp32"), True, False), (k, k, k, 8, 0, 0, 0))
            tables.find((row,), blocks, t.device)
        assert len(tables.recent) == launcher._MOST_TABLES

    def test_a_call_of_every_mix_keeps_one_table(self):
        """Graphs are captured after one call with the same tensors: its table must be there still,
        however many kinds of tensors it had.
        """
        from vicreg_kernels.ema.triton import launch as launcher

        lists = ema_tensors.every_dtype([(300,), (3, 4, 5)])
        launcher.update_(*lists, None, 0.9, False, 0, None, 0)
        assert len(launcher._tables.recent) == 1
        (kept,) = launcher._tables.recent.values()
        launcher.update_(*lists, None, 0.9, False, 0, None, 0)
        (again,) = launcher._tables.recent.values()
        assert again is kept
        assert len(kept[1]) > launcher._MOST_TABLES
