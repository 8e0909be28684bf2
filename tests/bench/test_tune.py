"""`vicreg-kernels bench --tune` with a clock that is made up: what is chosen, kept and used."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import barlow, groups, tune, tune_tables, vicreg
from bench.tune_tables import Problem, Side, Table
from vicreg_kernels import configs
from vicreg_kernels.core import dispatch, library
from vicreg_kernels.vicreg.triton import configs as vicreg_configs

ROOT = Path(__file__).resolve().parents[2]
NAME = "Made-up GPU (R) 80GB"
GENERAL = vicreg_configs.nearest("no such GPU", "bf16", 64, 8192)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The devices' files are in tmp_path."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.forget()
    yield tmp_path
    monkeypatch.undo()
    configs.forget()


class Kernels:
    """Stands for the VICReg kernels: it asks for a configuration as they do, and takes the time of
    `cost`; a configuration of which `broken` holds does not compile.
    """

    def __init__(self, cost, broken=lambda config: False, shape=(64, 8192)) -> None:
        self.cost, self.broken, self.shape = cost, broken, shape
        self.now = 0.0

    def __call__(self) -> None:
        config = vicreg_configs.nearest(NAME, "bf16", *self.shape)
        if self.broken(config):
            raise RuntimeError("out of resource: registers\nmore")
        self.now += self.cost(config)

    def problem(self) -> Problem:
        return Problem("half", {"shape": list(self.shape)}, GENERAL, lambda: self, "cpu")

    def timer(self, steps):
        times = {}
        for name, step in steps.items():
            before = self.now
            step()
            times[name] = self.now - before
        return times


def table(*problems, **candidates) -> Table:
    def shared(problem, name, value):
        return value[0] * 1000 if name == "product" else 0

    return Table(
        vicreg_configs, ("nearest",), lambda device: [*problems], {"half": candidates}, shared
    )


FAST, FASTEST, WIDE = (64, 16, 4, 3), (64, 32, 4, 4), (128, 64, 8, 4)
CANDIDATES = {
    "product": (FAST, FASTEST, WIDE, (32, 32, 4, 3)),
    "occupancy": (1, 2, 3),
}


def cost(config) -> float:
    by_product = {FAST: 4.0, FASTEST: 3.0, WIDE: 1.0}
    # a gain of 1 % is none
    return by_product.get(config.product, 5.0) * {1: 1.0, 2: 0.99, 3: 2.0}[config.occupancy]


def test_the_fastest_candidate_of_each_field_is_chosen_and_what_fails_is_named():
    kernels = Kernels(cost, broken=lambda config: config.product == (32, 32, 4, 3))
    result = tune.tune(table(**CANDIDATES), kernels.problem(), kernels, 100_000, kernels.timer)
    assert result.config == dataclasses.replace(GENERAL, product=FASTEST)
    assert result.ms == pytest.approx(3.0)
    assert result.general_ms == pytest.approx(5.0)
    assert result.skipped == {
        f"product {WIDE}": "takes 128000 bytes of shared memory of 100000",
        "product (32, 32, 4, 3)": "RuntimeError: out of resource: registers",
    }
    assert vicreg_configs.nearest(NAME, "bf16", 64, 8192) == GENERAL, "the lookup is as before"


def test_the_general_one_stays_where_none_is_faster():
    kernels = Kernels(lambda config: 1.0 if config == GENERAL else 0.99)
    result = tune.tune(table(**CANDIDATES), kernels.problem(), kernels, 10**6, kernels.timer)
    assert result.config == GENERAL
    assert result.ms == result.general_ms


def test_kernels_that_do_not_ask_for_a_configuration_are_an_error():
    """A launch that is kept from an earlier call would be timed in every candidate's place."""
    problem = Kernels(cost).problem()
    with pytest.raises(
        RuntimeError, match=r"without asking vicreg_kernels\.vicreg\.triton\.configs\.n"
    ):
        tune.tune(table(**CANDIDATES), problem, lambda: None, 10**6, lambda steps: {})


def tuner(path, timer, record=None, **more) -> tuple[tune.Tuner, list[str]]:
    said: list[str] = []
    record = configs.empty(NAME) if record is None else record
    return tune.Tuner("cpu", record, path, 100_000, timer, say=said.append, **more), said


def test_the_file_is_what_the_kernels_are_launched_with(folder):
    path = configs.path_of(NAME)
    assert path.name == "made-up-gpu-80gb.json"
    kernels = Kernels(cost)
    run, said = tuner(path, kernels.timer)
    run.rows("vicreg", table(kernels.problem(), **CANDIDATES))
    chosen = dataclasses.replace(GENERAL, product=FASTEST)
    # at once, for shapes nearest to it on this side of N = D, and for that GPU and format alone
    assert vicreg_configs.nearest(NAME, "bf16", 64, 8192) == chosen
    assert vicreg_configs.nearest(NAME, "fp16", 100, 9000) == chosen
    for other in ((NAME, "fp32", 64, 8192), (NAME, "bf16", 8192, 64), ("B", "bf16", 64, 8192)):
        assert vicreg_configs.nearest(*other) == vicreg_configs.nearest("none", *other[1:])
    (row,) = json.loads(path.read_text())["rows"]["vicreg"]
    assert (row["format"], row["shape"], row["product"]) == ("half", [64, 8192], [*FASTEST])
    assert (row["ms"], row["general_ms"]) == (3.0, 5.0)
    assert said[0] == "vicreg half shape [64, 8192]: 3 ms, 1.67x the general one's speed"
    assert said[1].startswith("  left out product (128, 64, 8, 4): takes 128000 bytes")
    # measured again, a row takes the place of the one before; other shapes stay
    other = Kernels(lambda config: 1.0, shape=(256, 2048))
    run.timer = other.timer
    run.rows("vicreg", table(other.problem(), **CANDIDATES))
    run.timer = kernels.timer
    kernels.cost = lambda config: 1.0
    run.rows("vicreg", table(kernels.problem(), **CANDIDATES))
    shapes = [row["shape"] for row in json.loads(path.read_text())["rows"]["vicreg"]]
    assert shapes == [[256, 2048], [64, 8192]]
    assert vicreg_configs.nearest(NAME, "bf16", 64, 8192) == GENERAL
    assert {row[0] for row in vicreg_configs.shipped()} == {"default", NAME}


def test_a_run_that_is_cut_short_has_kept_its_rows(folder):
    path = configs.path_of(NAME)
    first, second = Kernels(cost), Kernels(cost, shape=(256, 2048))

    def stopped(steps):
        if second.now:
            raise KeyboardInterrupt
        return first.timer(steps)

    run, _ = tuner(path, stopped)
    with pytest.raises(KeyboardInterrupt):
        run.rows("vicreg", table(first.problem(), second.problem(), **CANDIDATES))
    assert [row["shape"] for row in configs.read(path)["rows"]["vicreg"]] == [[64, 8192]]
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_a_row_that_fails_is_said_and_the_next_one_measured():
    bad = Kernels(cost, broken=lambda config: True, shape=(256, 2048))
    good = Kernels(cost)
    run, said = tuner(configs.path_of(NAME), good.timer)
    run.rows("vicreg", table(bad.problem(), good.problem(), **CANDIDATES))
    assert run.failed
    assert (
        said[0] == "vicreg half shape [256, 2048]: failed: RuntimeError: out of resource: registers"
    )
    assert [row["shape"] for row in run.record["rows"]["vicreg"]] == [[64, 8192]]


def test_nothing_starts_after_the_seconds():
    kernels = Kernels(cost)
    run, said = tuner(configs.path_of(NAME), kernels.timer, deadline=0.0)
    run.rows("vicreg", table(kernels.problem(), **CANDIDATES))
    run.thresholds("vicreg", lambda device: [Side("half", (512, 512), dict)])
    assert said == [
        "vicreg: no time left for half shape [64, 8192]",
        "vicreg: no time left for half 512x512",
    ]
    assert not configs.path_of(NAME).exists()


# ------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("faster", "expected"),
    [
        ({2048, 4096, 8192}, 2048),
        ({512, 4096, 8192}, 4096),
        ({512, 1024, 2048, 4096}, None),
        ({512, 1024, 2048, 4096, 8192}, 512),
        ({8192}, 8192),
        (set(), None),
    ],
)
def test_the_threshold_is_where_triton_wins_from_there_on(faster, expected):
    sides = [
        {"shape": shape, "cuda_ms": 1.0, "triton_ms": 0.9 if edge in faster else 1.1}
        for edge in (512, 1024, 2048, 4096, 8192)
        for shape in ([edge, 8192], [8192, edge])
    ]
    assert tune.threshold(sides) == expected
    if expected == 2048:  # at every shape of a size; and by more than the noise
        sides[5]["triton_ms"] = 1.1
        assert tune.threshold(sides) == 4096
        sides[5]["triton_ms"] = 0.99
        assert tune.threshold(sides) == 4096


def test_dispatch_follows_the_measured_threshold(monkeypatch):
    for name in ("CPU_MISSING", "CUDA_MISSING", "TRITON_MISSING"):
        monkeypatch.setattr(library, name, None)
    monkeypatch.setattr(dispatch, "ENVIRONMENT_BACKEND", None)
    monkeypatch.setattr(dispatch, "_gpu", lambda index: (0, NAME))
    device = torch.device("cuda", 0)

    def chosen(edge, dtype=torch.bfloat16):
        return dispatch.choose("barlow", None, device, dtype, edge)

    assert chosen(8192) == "cuda", "nothing is measured"
    now = [0.0]

    def step(milliseconds):
        return lambda: now.__setitem__(0, now[0] + milliseconds)

    def sides(device):
        return [
            Side("half", (edge, 8192), lambda edge=edge: {
                "cuda": step(1.0), "triton": step(0.5 if edge >= 4096 else 2.0)})
            for edge in (512, 2048, 4096, 8192)
        ]  # fmt: skip

    def timer(steps):
        times = {}
        for name, each in steps.items():
            before = now[0]
            each()
            times[name] = now[0] - before
        return times

    run, said = tuner(configs.path_of(NAME), timer)
    run.thresholds("barlow", sides)
    assert said[0] == "barlow half 512x8192: cuda 1 ms, triton 2 ms"
    record = configs.read(configs.path_of(NAME))
    assert record["triton_from"] == {"barlow": {"half": 4096}}
    assert record["sides"][0] == {
        "op": "barlow", "format": "half", "shape": [512, 8192], "cuda_ms": 1.0, "triton_ms": 2.0,
    }  # fmt: skip
    assert [chosen(edge) for edge in (2048, 4095, 4096, 8192)] == [
        "cuda",
        "cuda",
        "triton",
        "triton",
    ]
    assert chosen(8192, torch.float32) == "cuda"


# ------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("op", tune_tables.TABLES)
def test_candidates_are_values_of_the_ops_configuration(op):
    """Each is valid in a file, and some fit the 99 KiB of the smaller GPUs."""
    entry = tune_tables.TABLES[op]
    kind, keys = entry.module.Config, entry.module.KEYS
    problems = entry.problems("cpu")
    assert {p.format for p in problems} == set(configs.FORMATS) == entry.candidates.keys()
    for problem in problems:
        raw = {"format": problem.format, **problem.key, **dataclasses.asdict(problem.general)}
        for name, values in entry.candidates[problem.format].items():
            assert len(set(values)) == len(values)
            for value in values:
                row = json.loads(json.dumps({**raw, name: value}))
                parsed = configs.parse(row, kind, keys, op)
                assert getattr(parsed.config, name) == value
            assert any(entry.shared(problem, name, value) <= 99 << 10 for value in values)


def test_the_sides_are_those_that_the_benchmark_measures():
    """min(N, D) from 512 to 8192, on both sides of N = D."""
    edges = {512, 1024, 2048, 4096, 8192}
    for bench in (vicreg, barlow):
        named = [name.split("x") for name in bench.CASES if name.count("x") == 1]
        shapes = [tuple(map(int, each)) for each in named if each[1].isdecimal()]
        for wide in (True, False):
            assert edges <= {min(s) for s in shapes if (s[0] < s[1]) == wide}
    for wide in (True, False):
        assert edges == {min(s) for s in tune_tables.SIDES if (s[0] < s[1]) == wide}
    sides = tune_tables.THRESHOLDS["vicreg"]("cpu")
    assert {(s.format, s.shape) for s in sides} == {
        (format, shape) for format in configs.FORMATS for shape in tune_tables.SIDES
    }


REAL = """
import json, sys, torch
from bench import tune, tune_tables
from vicreg_kernels import configs
configs.FOLDER = __import__("pathlib").Path(sys.argv[1])
shapes = {"vicreg": {"shape": [8, 20]}, "barlow": {"shape": [8, 20]},
          "attention": {"head_dim": 16, "tokens": 20}}
tune_tables.TOKENS, tune_tables.HEADS = 20, 1
for op, table in tune_tables.TABLES.items():
    general = table.problems("cpu")[-1].general
    if op == "attention":
        build = lambda: tune_tables._attention_step(16, 20, "cpu", "single")
    else:
        bench = getattr(tune_tables, "bench_" + op)
        build = lambda bench=bench: tune_tables._loss_step(bench, (8, 20), "cpu", "single")
    problem = tune_tables.Problem("single", shapes[op], general, build, "cpu")
    name, values = next(iter(table.candidates["single"].items()))
    few = tune_tables.Table(table.module, table.lookups, lambda device: [problem],
                            {"single": {name: values[:2]}}, table.shared)
    last = f"{name} {[v for v in values[:2] if v != getattr(general, name)][-1]}"
    timer = lambda steps: {n: 1.0 if n in (last, "best") else 2.0 for n in steps}
    said = []
    run = tune.Tuner("cpu", configs.empty("here"), configs.path_of("here"), 1 << 20, timer,
                     say=said.append)
    run.rows(op, few)
    assert not run.failed and len(said) == 1, said
    (row,) = run.record["rows"][op]
    assert f"{name} {tuple(row[name])}" == last, (row, last)
    print(op, "tuned")
"""


def test_the_kernels_are_launched_with_each_candidate(folder):
    """The Triton kernels themselves, in the interpreter: all of them ask for the configuration."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(folder)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["vicreg", "tuned", "attention", "tuned", "barlow", "tuned"], (
        done.stderr
    )


def test_the_command_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--op", "ema"], ["--part", "all"]])
def test_unknown_names_list_the_known(words, capsys):
    with pytest.raises(SystemExit):
        tune.parse(words)
    assert f"{words[1]!r} is not one of" in capsys.readouterr().err


def test_a_lost_device_ends_the_run(monkeypatch):
    kernels = Kernels(cost, broken=lambda config: config.product == FAST)

    def lost(device, error):
        raise groups.Poisoned(str(error))

    monkeypatch.setattr(groups, "check_alive", lost)
    run, _ = tuner(configs.path_of(NAME), kernels.timer)
    with pytest.raises(groups.Poisoned):
        run.rows("vicreg", table(kernels.problem(), **CANDIDATES))
