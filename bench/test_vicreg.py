"""The op's standard rows under pytest-benchmark, in pedantic mode; not part of the test suite.

    python3 -m pytest bench --benchmark-group-by=param:case
    python3 -m pytest bench -k "ours or gram_plain" --benchmark-json=rows.json

Ratios between contenders come from `python3 -m bench.run`, which interleaves them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import measure, run
from bench.cases import CASES, QUICK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = QUICK if DEVICE.type == "cpu" else tuple(CASES)


@pytest.mark.parametrize("contender", run.QUICK_CONTENDERS)
@pytest.mark.parametrize("case", NAMES)
def test_step(benchmark: Any, case: str, contender: str) -> None:
    chosen = CASES[case]
    x, y = run.views(chosen, DEVICE, torch.float32)
    losses, _ = run.build([contender], chosen, backend=None)
    step = measure.make_step(losses[contender], x, y)

    def synchronised() -> Any:
        gradients = step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return gradients

    seconds, _ = run.warm_up(contender, step, DEVICE)
    rounds = measure.rounds_of(seconds, share=1.0, least=1)
    gradients = benchmark.pedantic(synchronised, rounds=rounds, iterations=1, warmup_rounds=0)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    assert all(gradient.isfinite().all() for gradient in gradients)
