"""Every op's quick cases under pytest-benchmark, in pedantic mode; not part of the test suite.

    python3 -m pytest bench --benchmark-group-by=param:op,param:case
    python3 -m pytest bench -k "vicreg and (ours or gram_plain)" --benchmark-json=rows.json

Ratios between contenders come from `python3 -m bench.run`, which interleaves them.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import pytest
import torch

from bench import OPS, groups, measure
from bench.case import Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULES = {op: import_module(f"bench.{op}") for op in OPS}
ROWS = [
    (op, name, contender)
    for op, module in MODULES.items()
    for name, case in module.CASES.items()
    if case.quick and DEVICE.type in case.dtypes
    for contender in ("ours", *module.CONTENDERS)
]


@lru_cache(maxsize=1)
def plan(op: str, name: str) -> Plan:
    case = MODULES[op].CASES[name]
    return case.build(DEVICE, getattr(torch, case.dtypes[DEVICE.type][0]), None)


@pytest.mark.parametrize(("op", "case", "contender"), ROWS)
def test_step(benchmark: Any, op: str, case: str, contender: str) -> None:
    planned = plan(op, case)
    if contender not in planned.steps:
        pytest.skip(planned.skipped.get(contender, "is no contender of this case"))
    if contender in (*planned.compiled, *planned.peers):
        pytest.skip("takes long: python3 -m bench.run measures it")
    step = planned.steps[contender]

    def synchronised() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    seconds, _ = groups.warm_up(step, DEVICE.type == "cuda", DEVICE)
    rounds = measure.rounds_of(seconds, share=1.0)
    benchmark.pedantic(synchronised, rounds=rounds, iterations=1, warmup_rounds=0)
    benchmark.extra_info["threads"] = torch.get_num_threads()
