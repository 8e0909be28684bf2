"""What the sanitized builds run: every kernel, on shapes that meet every edge.

Its arguments are a library, the name of its ops and a mode: "plain", or "short", which hands the
backward pass saved floats short of memory.
"""

from __future__ import annotations

import sys

import torch

from tests.helpers import native
from vicreg_kernels.adaln import reference


def main(library: str, namespace: str, mode: str) -> None:
    torch.ops.load_library(library)
    op = getattr(torch.ops, namespace)
    torch.manual_seed(0)
    for frames, tokens, dim in [(1, 1, 1), (2, 5, 7), (3, 9, 8), (2, 20, 40), (5, 1, 24),
                                (1, 140, 17), (2, 3, 520), (1, 2, 1601)]:  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for wide in (False, True):
                x = torch.randn(frames, tokens, dim).to(dtype)
                if wide:  # strided too
                    x = x.mT.contiguous().mT
                vectors = torch.randn(frames, 3 * dim).to(torch.float32 if wide else dtype)
                one(op, x, *vectors.chunk(3, dim=-1), mode)
    print("clean")


def close(actual, expected) -> None:
    error = (actual.double() - expected.double()).norm()
    assert error <= 0.02 * expected.double().norm() + 1e-3 * actual.numel() ** 0.5, error


def one(op, x, shift, scale, gate, mode) -> None:
    out, saved = op.adaln_norm_forward(x, shift, scale, 1e-2)
    close(out, reference.modulated_layer_norm(x, shift, scale, 1e-2))
    if mode == "short":
        native.shortened(saved)
    grad = torch.randn_like(x)
    leaves = [z.double().requires_grad_() for z in (x, shift, scale)]
    truth = torch.autograd.grad(
        reference.modulated_layer_norm(*leaves, 1e-2), leaves, grad.double()
    )
    for needs in ((True, True), (True, False), (False, True)):
        grads = op.adaln_norm_backward(grad, x, scale, saved, *needs)
        for mine, theirs, need in zip(grads, truth, (needs[0], needs[1], needs[1]), strict=True):
            close(mine, theirs) if need else None
            assert need or mine.numel() == 0
    close(op.adaln_gate_forward(x, grad, gate), reference.gated_residual(x, grad, gate))
    for needs in ((True, True), (True, False), (False, True)):
        to_y, to_gate = op.adaln_gate_backward(grad, x, gate, *needs)
        if needs[0]:
            close(to_y, grad.double() * gate.double()[:, None])
        if needs[1]:
            close(to_gate, (grad.double() * x.double()).sum(1))


if __name__ == "__main__":
    main(*sys.argv[1:])
