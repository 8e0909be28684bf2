"""Tier 4: the VICRegL ops' Triton kernels, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from tests.vicregl import matches as cases
from tests.vicregl.matches import DTYPES, maps
from vicreg_kernels.core import loader
from vicreg_kernels.vicregl import contract


@pytest.mark.interpreted
class TestInterpreter:
    # U, V, B, L1, L2, C: one tile and several of each size, one block of channels and several.
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.sampled(2)
    def test_matches_and_pairs(self, dtype):
        cases.check("triton", *maps((1, 2, 1, 4, 3, 9), dtype=dtype), cases.SETS[:1])

    def test_more_positions_than_a_tile(self):
        cases.check("triton", *maps((1, 1, 1, 2, 18, 20)), cases.SETS[:1])
        cases.check_match("triton", *maps((1, 1, 1, 70, 33, 3)))

    def test_wide_maps(self):
        cases.check("triton", *maps((1, 1, 1, 9, 3, 140)), cases.SETS[1:])
        cases.check("triton", *maps((1, 1, 1, 1, 1, 1100)), cases.SETS[:1])

    def test_layouts(self):
        cases.check("triton", *maps((1, 1, 2, 2, 1, 6), layout="channels_first"), cases.SETS[:1])
        cases.check("triton", *maps((2, 1, 1, 2, 1, 6), layout="expanded"), cases.SETS[:1])

    def test_one_side_alone(self):
        shape = (1, 1, 1, 3, 2, 5)
        for need in ((True, False), (False, True)):
            a, b = (z.requires_grad_(n) for z, n in zip(maps(shape, grad=False), need, strict=True))
            cases.check("triton", a, b, cases.SETS[:1])

    def test_ties(self):
        cases.check_ties("triton", dtypes=(torch.float32,))

    def test_close_positions(self):
        cases.check_close_positions("triton")

    def test_nan_and_inf(self):
        cases.check_not_finite("triton", views=1)

    @pytest.mark.parametrize("bad", [-1, 5])
    def test_indices_out_of_range_are_never_followed(self, bad):
        cases.check_out_of_range(loader.load("vicregl", contract.Kernels, "triton"), bad)
