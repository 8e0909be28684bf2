"""Tier 4: the Triton kernels, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from tests.adaln.cases import (
    FORMS,
    LAYOUTS,
    MIXES,
    check_gate,
    check_norm,
    draw,
    run,
    vectors,
)
from vicreg_kernels.adaln import modulated_layer_norm


@pytest.mark.interpreted
class TestInterpreter:
    @pytest.mark.parametrize("mix", MIXES, ids=str)
    @pytest.mark.parametrize("dim", [24, 17])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.sampled(8)
    def test_dtypes(self, form, dim, mix):
        check_norm("triton", (2, 1, 3, dim), mix, form=form)
        check_gate("triton", (2, 1, 3, dim), mix, form=form)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.sampled(3)
    def test_layouts(self, layout):
        check_norm("triton", (2, 2, 24), layout=layout)
        check_gate("triton", (2, 2, 24), layout=layout)

    @pytest.mark.parametrize("shape", [(1, 18, 9), (1, 1, 1), (2, 2, 600), (18, 1, 5)], ids=str)
    @pytest.mark.sampled(2)
    def test_shapes(self, shape):
        """One of everything, several programs a frame, several tiles, frames of one token."""
        check_norm("triton", shape)
        check_gate("triton", shape)

    @pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0)])
    def test_gradients_of_some(self, needs):
        x, (shift, scale) = draw(2, 3, 9), vectors(2, (2, 3, 9))
        for z, need in zip((x, shift, scale), needs, strict=True):
            z.requires_grad_(bool(need))
        results = run(lambda *z: modulated_layer_norm(*z, backend="triton"), x, shift, scale)
        plain = run(lambda *z: modulated_layer_norm(*z, backend="reference"), x, shift, scale)
        for mine, theirs in zip(results, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("bad", [float("nan"), 1e30])
    def test_what_is_not_finite_stays_in_its_token(self, bad):
        x = draw(2, 3, 24, grad=False)
        x[1, 2, 5] = bad
        leaves = [x.requires_grad_(), *vectors(2, x.shape)]
        mine, theirs = (
            run(lambda *z, name=name: modulated_layer_norm(*z, backend=name), *leaves)
            for name in ("triton", "reference")
        )
        for actual, expected in zip(mine, theirs, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())
