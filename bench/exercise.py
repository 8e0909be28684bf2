"""A short run of every fused CUDA backend: what compute-sanitizer and ncu watch.

Shapes on both sides of N = D that no tile divides, groups, strided input, one and two views.
"""

from __future__ import annotations

import argparse
import sys

import torch

from vicreg_kernels import dispatch, variance_covariance, vicreg_loss

SMALL = ((13, 67), (67, 13), (130, 33), (33, 130))


def exercise(backend: str, device: str, shapes: list[tuple[int, int]]) -> int:
    """Runs forward and backward; returns the count of results that are not finite."""
    bad = 0
    for dtype in (torch.float32, torch.bfloat16):
        for rows, dim in shapes:
            x, y = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(2))
            x.requires_grad_()
            y.requires_grad_()
            loss = vicreg_loss(x, y, backend=backend)
            results = (loss, *torch.autograd.grad(loss, (x, y)))
            if (rows, dim) == SMALL[0]:
                z = torch.randn(3, 2 * rows, dim, device=device).to(dtype)[:, ::2].requires_grad_()
                total = sum(variance_covariance(z, backend=backend))
                results += (total, *torch.autograd.grad(total, (z,)))
            bad += sum(not result.isfinite().all().item() for result in results)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.exercise", description=__doc__)
    parser.add_argument("--backend", choices=("cpu", "triton", "cuda"), action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", help="ROWSxDIM in place of the small ones")
    options = parser.parse_args()
    rows_dim = [int(n) for n in options.shape.split("x")] if options.shape else None
    shapes = [(rows_dim[0], rows_dim[1])] if rows_dim else list(SMALL)
    bad = 0
    for backend in options.backend or ("cuda", "triton"):
        reason = dispatch.missing(backend, options.device, torch.float32)
        if reason is None:
            found = exercise(backend, options.device, shapes)
            print(f"{backend}: {found} results not finite")
        else:
            found = 1
            print(f"{backend}: {reason}")
        bad += found
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
