"""What the sanitized builds of the tokens ops run: every kernel, on shapes that meet every edge.

Its arguments are a library, the name of its ops and a mode: "plain", or "short", which hands the
backward pass saved floats short of memory.
"""

from __future__ import annotations

import sys

import torch

from tests.helpers import native
from vicreg_kernels.tokens import reference


def main(library: str, namespace: str, mode: str) -> None:
    torch.ops.load_library(library)
    op = getattr(torch.ops, namespace)
    torch.manual_seed(0)
    for batch, tokens, kept, dim in [(1, 1, 1, 1), (2, 5, 3, 7), (3, 9, 9, 8), (2, 20, 11, 40),
                                     (1, 6, 4, 200), (2, 3, 2, 1601)]:  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for wide in (torch.int32, torch.int64):
                drawn = [torch.randperm(tokens)[:kept] for _ in range(batch)]
                dense = torch.stack(drawn).to(wide)
                offsets = torch.tensor([0, *[kept] * batch]).cumsum(0)
                x = torch.randn(batch, tokens, dim).to(dtype)
                if wide == torch.int64:  # strided too
                    x = x.mT.contiguous().mT
                one(op, x, dense, None, mode)
                one(op, x, dense.flatten(), offsets, mode)
    print("clean")


def one(op, x, index, offsets, mode) -> None:
    batch, tokens, dim = x.shape
    rows = op.tokens_gather(x, index, offsets)
    assert torch.equal(rows, reference.gather(x, index, offsets))
    back = op.tokens_scatter(rows, index, offsets, batch, tokens, 0.0, False, False)
    assert torch.equal(back, reference.scatter(rows, index, offsets, batch, tokens, 0.0))
    repeated = torch.zeros_like(index)
    total = op.tokens_scatter(rows, repeated, offsets, batch, tokens, 0.0, True, True)
    truth = rows.double().flatten(0, -2).sum(0)
    assert (total[0].double() - truth).norm() <= 0.02 * truth.norm() + 0.05, (total[0], truth)
    for kind, name in enumerate(("smooth_l1", "l1", "mse", "cosine")):
        args = (rows, x, index, offsets)
        loss, saved = op.tokens_loss_forward(*args, kind, True, 1.0, 1e-5)
        if mode == "short":
            native.shortened(saved)
        grad = op.tokens_loss_backward(torch.ones(()), *args, saved, kind, True, 1.0)
        leaf = rows.double().requires_grad_()
        expected = reference.loss(leaf, x.double(), index, offsets, name, True, 1.0, 1e-5)
        expected.backward()
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
        if dim > 1:
            error = (grad.double() - leaf.grad).norm()
            assert error <= 0.02 * leaf.grad.norm() + 1e-6, (kind, dim, error)
    order, context_rows, target_rows = op.tokens_order(index, index, offsets, offsets)
    if offsets is not None:
        rows, index, order = rows[None], index[None], order[None]
        context_rows, target_rows = context_rows[None], target_rows[None]
    for target in (torch.randn(dim), rows):
        for table in (None, torch.randn(tokens, dim)):
            made = op.tokens_assemble(rows, index, context_rows, target, index, target_rows, table)
            assert made.isfinite().all()
    op.tokens_column_sum(made, target_rows)
    if offsets is None:
        assert torch.equal(order.sort(dim=1).values, order)


if __name__ == "__main__":
    main(*sys.argv[1:])
