"""A short run of every op's fused backends: what compute-sanitizer and ncu watch.

Each op's own small shapes (`exercise` of bench/<op>.py), the smallest of them, or ours at its first
case, of real size. A line an op and backend says how many results were not finite.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from bench import OPS
from vicreg_kernels.core import dispatch


def first_case(op: str, backend: str, device: str) -> int:
    """One step of ours, in the first dtype that is measured."""
    case = next(iter(import_module(f"bench.{op}").CASES.values()))
    dtype = getattr(torch, case.dtypes.get(device, ("float32",))[-1])
    case.build(torch.device(device), dtype, backend).steps["ours"]()
    return 0


def small(op: str, backend: str, device: str) -> int:
    """The op's own exercise; an op without one has nothing to watch."""
    run: Callable[[str, str], int] | None = getattr(import_module(f"bench.{op}"), "exercise", None)
    return run(backend, device) if run else 0


class Enough(Exception):
    """Raised after an exercise's first gradient."""


def smallest(op: str, backend: str, device: str) -> int:
    """The op's exercise up to its first gradient: each kernel at one shape and dtype, few Triton
    compilations. Exercises begin with a small odd shape. One without gradients runs to its end.
    """
    real, bad = torch.autograd.grad, 0

    def grad(*args: Any, **options: Any) -> Any:
        nonlocal bad
        bad = sum(not result.isfinite().all().item() for result in real(*args, **options))
        raise Enough

    torch.autograd.grad = grad
    try:
        return small(op, backend, device)
    except Enough:
        return bad
    finally:
        torch.autograd.grad = real


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.exercise", description=__doc__)
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    parser.add_argument("--backend", choices=("cpu", "triton", "cuda"), action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--first-case", action="store_true", help="one step of real size")
    parser.add_argument("--smallest", action="store_true", help="one shape of the exercise")
    options = parser.parse_args(argv)
    run = first_case if options.first_case else smallest if options.smallest else small
    bad = 0
    for op in options.op or OPS:
        for backend in options.backend or ("cuda", "triton"):
            reason = dispatch.missing(backend, options.device, torch.float32)
            try:
                if reason is not None:
                    raise RuntimeError(reason)
                not_finite = run(op, backend, options.device)
                print(f"{op} {backend}: {not_finite} results not finite", flush=True)
            except Exception:  # the next op is watched all the same
                traceback.print_exc()
                not_finite = 1
            bad += not_finite
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
