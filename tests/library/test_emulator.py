"""The emulator itself: barriers, warp operations, and the faults it must report."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers import native

SEEDS = range(6)


@pytest.fixture(scope="module")
def program() -> Path:
    return native.selftest()


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return native.selftest(sanitize=True)


def run(program: Path, case: str, seed: int = 0, stdin: bytes = b""):
    environment = {**os.environ, "EMULATOR_SEED": str(seed)}
    return subprocess.run([program, case], env=environment, capture_output=True, input=stdin)


def numbers(program: Path, case: str, seed: int = 0) -> list[float]:
    done = run(program, case, seed)
    assert done.returncode == 0, done.stderr.decode()
    return [float(word) for word in done.stdout.split()]


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers(program, seed):
    blocks = torch.arange(3 * 96.0).view(3, 96)
    assert numbers(program, "reverse", seed) == blocks.flip(1).flatten().tolist()
    sums = torch.arange(1.0, 65.0).repeat(6)
    assert numbers(program, "prefix_sums", seed) == sums.tolist()
    assert numbers(program, "votes", seed) == [1.0] * 96 + [0.0] * 96 + [1.0] * 96


def test_a_missing_barrier_shows(program):
    """Under most orders some thread reads shared memory that is still NaN."""
    right = numbers(program, "reverse")
    wrong = [numbers(program, "reverse_without_barrier", seed) for seed in SEEDS]
    assert all(values != right for values in wrong)
    assert all(value != value for value in wrong[0] if value not in right)
    assert len({str(values) for values in wrong}) > 1


def lanes(values: torch.Tensor, source: torch.Tensor) -> list[float]:
    return values[source].tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_operations(program, seed):
    values = torch.tensor(numbers(program, "exchanges", seed)).view(48, 10)
    for first, count in ((0, 32), (32, 16)):
        lane = torch.arange(count)
        value = (first + lane).float()
        mine = values[first : first + count]
        assert mine[:, 0].tolist() == lanes(value, lane ^ 5)
        down = lane + 3
        inside = down < count  # past the mask CUDA leaves the value undefined
        assert mine[inside, 1].tolist() == lanes(value, down[inside])
        assert mine[29:, 1].tolist() == value[29:].tolist()
        assert mine[:, 2].tolist() == lanes(value, torch.where(lane % 8 < 2, lane, lane - 2))
        assert mine[:, 3].tolist() == lanes(value, torch.full_like(lane, 7))
        assert mine[:, 4].tolist() == lanes(value, lane // 4 * 4 + 3)
        ballot = float(sum(1 << i for i in range(count) if i % 3 == 0))
        assert torch.equal(mine[:, 5], torch.full((count,), ballot))
        assert mine[:, 6].tolist() == [5.0] * count
        assert mine[:, 7].tolist() == [value.sum().item()] * count
        assert mine[:, 8].tolist() == (0.5 * (value + value[lane ^ 1])).tolist()
        assert mine[:, 9].tolist() == lanes(value, lane ^ 15)


def test_atomics_and_the_order_of_blocks(program):
    runs = [numbers(program, "arrivals", seed) for seed in SEEDS]
    assert all(values[:2] == [50 * 33, 49 * 100 + 32] for values in runs)
    assert len({values[2] for values in runs}) > 1
    assert runs[3] == numbers(program, "arrivals", 3)


def test_shared_memory_is_poisoned_for_each_block(program):
    fixed, dynamic = numbers(program, "unwritten")[::2], numbers(program, "unwritten")[1::2]
    assert all(value != value for value in fixed)
    assert dynamic == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("barrier_of_half", "threads 16 to 31 have returned"),
        ("barriers_on_two_lines", "divergent barrier"),
        ("shuffle_of_half", "threads 0 to 15 wait in a warp operation"),
        ("shuffle_against_barrier", "threads 16 to 31 wait at __syncthreads, "),
        ("too_many_threads", "invalid launch configuration"),
        ("too_many_blocks", "invalid launch configuration"),
        ("too_much_dynamic", "invalid launch configuration"),
        ("too_much_static", "48 KiB of static shared memory"),
    ],
)
def test_faults_are_errors(program, case, message):
    done = run(program, case)
    assert done.returncode == 1
    assert message in done.stderr.decode()
    assert done.stderr.decode().startswith("emulator: ")


def test_runs_again_after_an_error(program, sanitized):
    for build in (program, sanitized):
        assert numbers(build, "after_error") == torch.arange(1.0, 65.0).repeat(6).tolist()


@pytest.mark.parametrize("case", ["reverse", "prefix_sums", "exchanges", "arrivals", "in_bounds"])
def test_address_sanitizer_follows_the_fibers(program, sanitized, case):
    assert str(numbers(sanitized, case)) == str(numbers(program, case))


@pytest.mark.parametrize("case", ["past_fixed", "before_fixed", "past_dynamic"])
def test_address_sanitizer_sees_shared_memory_bounds(sanitized, case):
    done = run(sanitized, case)
    assert done.returncode not in (0, 1) or b"AddressSanitizer" in done.stderr
    assert b"heap-buffer-overflow" in done.stderr
    assert b"_access" in done.stderr, "the report names the kernel"


def test_half_conversions(program):
    """Every half and bfloat16 value, and floats at every rounding boundary, as torch has them."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    halves, bfloats = every.view(torch.float16).float(), every.view(torch.bfloat16).float()
    finite = torch.cat([z[z.isfinite()] for z in (halves, bfloats)])
    between = 0.5 * (finite + finite.nextafter(torch.tensor(float("inf"))))
    grid = halves[halves.isfinite()].sort().values
    edges = 0.5 * (grid[1:] + grid[:-1])
    floats = torch.cat([finite, between, edges, edges.nextafter(torch.tensor(float("inf")))])
    floats = torch.cat([floats, torch.randn(10000), torch.tensor([float("inf"), -float("inf")])])
    done = run(program, "halves", stdin=floats.numpy().tobytes())
    wide = torch.frombuffer(bytearray(done.stdout[: 65536 * 8]), dtype=torch.float32).view(-1, 2)
    narrow = torch.frombuffer(bytearray(done.stdout[65536 * 8 :]), dtype=torch.int16).view(-1, 2)
    for column, expected in enumerate((halves, bfloats)):
        same = (wide[:, column] == expected) | (wide[:, column].isnan() & expected.isnan())
        assert same.all()
    assert torch.equal(narrow[:, 0], floats.half().view(torch.int16))
    assert torch.equal(narrow[:, 1], floats.bfloat16().view(torch.int16))


@pytest.mark.parametrize("build", ["program", "sanitized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_core_products(request, build, dtype):
    """mma.cuh's layouts, operands as they are and transposed, and a result as the next operand."""
    a, b = (torch.randint(-3, 4, (16, 16)).float() for _ in range(2))  # exact in both types
    case = f"products_{str(dtype).removeprefix('torch.')}"
    done = run(request.getfixturevalue(build), case, stdin=torch.stack((a, b)).numpy().tobytes())
    assert done.returncode == 0, done.stderr.decode()
    products = torch.tensor([float(word) for word in done.stdout.split()]).view(4, 2, 16, 16)
    for (once, twice), (left, right) in zip(
        products, ((a, b), (a.mT, b), (a, b.mT), (a.mT, b.mT)), strict=True
    ):
        assert torch.equal(once, left @ right)
        assert torch.equal(twice, once.to(dtype).float() @ right)


def test_asynchronous_copies(program):
    early, late, zero = numbers(program, "copies")
    assert early != early, "the target holds NaN until its thread waits"
    assert (late, zero) == (2.0, 0.0)
