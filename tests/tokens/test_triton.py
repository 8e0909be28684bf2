"""Tier 4: the tokens ops' Triton kernels, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from tests.tokens.cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    check_assembly,
    check_gather,
    check_loss,
    check_out_of_range,
    check_scatter,
    draw,
    mask,
)
from vicreg_kernels.tokens import prediction_loss


@pytest.mark.interpreted
class TestInterpreter:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [1, 40])
    @pytest.mark.parametrize("repeat", [False, True])
    @pytest.mark.sampled(5)
    def test_gather_and_scatter(self, dim, dtype, repeat):
        for count, wide in ((5, torch.int64), ([5, 0, 9], torch.int32)):
            chosen = mask(3, 9, count, dtype=wide, repeat=repeat)
            check_gather("triton", draw(3, 9, dim, dtype=dtype), chosen, repeats=9)
            if not repeat:
                z = draw(*chosen.index.shape, dim, dtype=dtype)
                check_scatter("triton", z, chosen, 9, 1.5)

    def test_no_rows(self):
        check_gather("triton", draw(2, 5, 8), mask(2, 5, 0))
        check_scatter("triton", draw(2, 0, 8), mask(2, 5, 0), 5, -2.0)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.sampled(2)
    def test_layouts(self, layout):
        z = draw(2, 4, 16, layout=layout)
        check_gather("triton", z, mask(2, 4, 3, repeat=True), repeats=3)
        check_scatter("triton", z, mask(2, 6, 4), 6, 0.0)
        teacher = draw(2, 6, 16, layout=layout, grad=False)
        check_loss("triton", z, teacher, mask(2, 6, 4).index)
        check_assembly("triton", z, mask(2, 6, 4), draw(16), mask(2, 6, 3), draw(6, 16))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("dim", [1, 33, 64])
    @pytest.mark.sampled(5)
    def test_loss(self, dim, normalize, kind):
        settings = {"kind": kind, "normalize_target": normalize, "beta": 0.7}
        teacher = draw(2, 9, dim, grad=False)
        index = torch.cat([mask(2, 9, 5).index for _ in range(2)])
        check_loss("triton", draw(4, 5, dim), teacher, index, **settings)
        packed = mask(2, 9, [0, 9], dtype=torch.int32)
        pred = draw(9, dim)
        check_loss("triton", pred, teacher, packed.index, offsets=packed.offsets, **settings)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("teacher_dtype", DTYPES)
    @pytest.mark.sampled(2)
    def test_loss_of_every_pair_of_dtypes(self, dtype, teacher_dtype):
        teacher = draw(2, 9, 25, dtype=teacher_dtype, grad=False)
        check_loss("triton", draw(2, 5, 25, dtype=dtype), teacher, mask(2, 9, 5).index)

    @pytest.mark.parametrize("beta", [0.0, 2.0])
    def test_beta(self, beta):
        teacher = draw(2, 9, 24, grad=False)
        check_loss("triton", draw(2, 5, 24), teacher, mask(2, 9, 5).index, beta=beta)

    @pytest.mark.parametrize("table", [False, True])
    @pytest.mark.parametrize("rows", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.sampled(3)
    def test_assembly(self, dtype, rows, table):
        for ordered, repeat in ((True, False), (False, True)):
            settings = {"ordered": ordered, "repeat": repeat, "dtype": torch.int32}
            dense = mask(1, 8, 3, **settings), mask(2, 8, 4, **settings)
            packed = mask(3, 8, [3, 0, 2], **settings), mask(3, 8, [0, 2, 5], **settings)
            for kept, wanted in (dense, packed):
                context = draw(*kept.index.shape, 33, dtype=dtype)
                token = draw(*((*wanted.index.shape, 33) if rows else (33,)), dtype=dtype)
                positions = draw(8, 33) if table else None
                check_assembly("triton", context, kept, token, wanted, positions)

    @pytest.mark.thorough
    def test_assembly_of_more_tokens_than_a_block(self):
        kept, wanted = mask(1, 400, 150), mask(1, 400, 170)
        check_assembly("triton", draw(1, 150, 4), kept, draw(4), wanted)
        kept, wanted = mask(2, 400, [150, 20]), mask(2, 400, [0, 170])
        check_assembly("triton", draw(170, 4), kept, draw(4), wanted)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", KINDS)
    def test_nan_and_inf_spread_as_in_the_reference(self, kind, bad):
        index = mask(2, 6, 4).index
        for place in ("pred", "teacher"):
            pred, teacher = draw(2, 4, 9), draw(2, 6, 9, grad=False)
            with torch.no_grad():
                (pred[1, 2] if place == "pred" else teacher[1, index[1, 2]])[5] = bad

            def outcome(backend, pred=pred, teacher=teacher):
                loss = prediction_loss(pred, teacher, index, kind=kind, backend=backend)
                return loss.detach(), *torch.autograd.grad(loss, pred)

            for mine, theirs in zip(outcome("triton"), outcome("reference"), strict=True):
                assert torch.equal(mine.isnan(), theirs.isnan())

    @pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
    def test_indices_out_of_range_are_never_followed(self, bad):
        from vicreg_kernels.tokens.triton import launch as kernels

        check_out_of_range(kernels, bad, torch.int64, 8)

    def test_a_cosine_whose_squares_float32_does_not_hold_is_not_a_number(self):
        pred, teacher, index = 1e27 * torch.randn(1, 4, 24), torch.randn(1, 4, 24), torch.arange(4)
        pred.requires_grad_()
        loss = prediction_loss(pred, teacher, index[None], kind="cosine", backend="triton")
        (grad,) = torch.autograd.grad(loss, pred)
        assert loss.isnan()
        assert grad.isnan().all()
