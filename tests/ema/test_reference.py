"""Tier 1: the EMA against closed forms, float64 and what published code computes; and the random
bits and roundings that every backend must reproduce.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.ema import tensors as ema_tensors
from tests.ema.tensors import FUSED, MOMENTA
from tests.helpers.tolerances import FEWEST_ROUNDINGS, assert_close_to_truth
from vicreg_kernels.ema import ema_update_, reference

HALVES = (torch.bfloat16, torch.float16)


def update(targets, onlines, momentum, **settings):
    ema_update_(targets, onlines, momentum, backend="reference", **settings)


def test_n_steps_are_the_closed_form():
    """A constant online tensor: t_n = o + m^n (t_0 - o)."""
    t, o = torch.randn(2, 50, dtype=torch.float64)
    expected = o + 0.9**20 * (t - o)
    for _ in range(20):
        update([t], [o], 0.9)
    torch.testing.assert_close(t, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize("online", FUSED)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_error_against_float64(dtype, online, momentum, scale):
    """Two ends that are near each other, and two that are not."""
    t, o = (torch.randn(1000) * scale).to(dtype), torch.randn(1000).to(online)
    truth = momentum * t.double() + (1 - momentum) * o.double()
    plain = (momentum * t.float() + (1 - momentum) * o.float()).to(dtype)
    update([t], [o], momentum)
    assert_close_to_truth(t, truth, plain, dtype, FEWEST_ROUNDINGS, "target")


@pytest.mark.parametrize("dtype", [*FUSED, torch.float64])
def test_the_ends_are_exact(dtype):
    """Where t + (1 - m)(o - t) would miss: the target a million times larger."""
    before, o = torch.randn(500).mul(1e4).to(dtype), torch.randn(500).mul(1e-2).to(dtype)
    kept, copied = before.clone(), before.clone()
    update([kept], [o], 1.0)
    update([copied], [o], 0.0)
    assert torch.equal(kept, before)
    assert torch.equal(copied, o)


def test_what_published_code_computes():
    """In float64: mul_ and add_ (I-JEPA), lerp_ (timm, torch), to the last bits."""
    t, o = torch.randn(2, 300, dtype=torch.float64)
    ours, loop, lerp = t.clone(), t.clone(), t.clone()
    update([ours], [o], 0.996)
    loop.mul_(0.996).add_(o, alpha=1 - 0.996)
    lerp.lerp_(o, 1 - 0.996)
    torch.testing.assert_close(ours, loop, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(ours, lerp, rtol=1e-14, atol=1e-15)


def test_mixed_float64():
    t, o = torch.randn(9), torch.randn(9, dtype=torch.float64)
    truth = (0.9 * t.double() + 0.1 * o).float()
    update([t], [o], 0.9)
    torch.testing.assert_close(t, truth, rtol=1e-7, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_as_a_tensor(momentum, dtype):
    t, o = torch.randn(2, 99)
    by_number, by_tensor = t.clone(), t.clone()
    value = torch.tensor(momentum, dtype=dtype)
    update([by_number], [o], value.item())
    update([by_tensor], [o], value)
    assert torch.equal(by_number, by_tensor)
    inside = reference.interpolate(t, o, value)  # the form for a value that is not on the host
    assert torch.equal(inside, by_number)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", FUSED)
def test_nan_and_inf_propagate(bad, rounding, dtype):
    """As through torch.lerp, where an infinite target gives NaN."""
    t, o = torch.randn(2, 40).to(dtype)
    o[3], t[5] = bad, bad
    expected = torch.lerp(t.float(), o.float(), 0.1)
    update([t], [o], 0.9, rounding=rounding, step=0)
    assert torch.equal(t.isnan(), expected.isnan())
    assert bad != bad or t[3] == bad
    assert t.isfinite().sum() == 38


@pytest.mark.parametrize("dtypes", [*itertools.product(FUSED, repeat=3)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_shadow_is_the_target_as_stored(dtypes, rounding):
    t, o, shadow = (torch.randn(4, 5).to(dtype) for dtype in dtypes)
    update([t], [o], 0.7, shadows=[shadow], rounding=rounding, step=2)
    assert torch.equal(shadow, t.to(shadow.dtype))


def philox_plain(counter, key):
    """Philox4x32-10 in Python integers."""
    x, y, z, w = counter
    for _ in range(10):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = b >> 32 ^ y ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ w ^ key[1], a & 0xFFFFFFFF
        key = ((key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF)
    return x, y, z, w


def test_philox_is_the_published_generator():
    """The known answers of Random123 for philox4x32-10."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    known = {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((ones,) * 4, (ones, ones)): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (pi, (0xA4093822, 0x299F31D0)): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (counter, key), answer in known.items():
        assert philox_plain(counter, key) == answer
        words = reference.philox(tuple(torch.tensor([c]) for c in counter), key[1] << 32 | key[0])
        assert tuple(word.item() for word in words) == answer


def test_random_bits_of_elements():
    """Counter and key as documented, the low half of a word first."""
    seed, step, index = 2**62 + 12345, 2**40 + 7, 3
    bits = reference.random_bits(21, seed, step, index, torch.device("cpu"))
    key = (seed & 0xFFFFFFFF, seed >> 32)
    for element in range(21):
        counter = (element // 8, (step >> 32) << 16, index, step & 0xFFFFFFFF)
        word = philox_plain(counter, key)[element % 8 // 2]
        assert bits[element] == (word >> 16 * (element % 2)) & 0xFFFF


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_takes_the_two_neighbours_in_proportion(dtype):
    """All 65536 random values: the mean is the value itself, to 16 bits of a step."""
    scales = 2.0 ** torch.arange(-27, 10)
    values = torch.cat([torch.tensor([1.0, 1.3, -1.7, 1.999]) * s for s in scales]).float()
    values = torch.cat([values, torch.zeros(1)])
    random = torch.arange(65536)
    for value in values:
        rounded = reference.stochastic_round(value.expand(65536).clone(), random, dtype)
        below, above = rounded.min(), rounded.max()
        step = (above.double() - below.double()).item()
        mean = rounded.double().mean().item()
        whole = torch.nextafter(value.abs().to(dtype), torch.tensor(float("inf"), dtype=dtype))
        unit = (whole.double() - value.abs().to(dtype).double()).item()
        assert step <= unit * (1 + 1e-9), value
        assert abs(mean - value.item()) <= unit * 2**-13, value


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_keeps_what_the_dtype_holds(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for random in (0, 1, 0x7FFF, 0xFFFF):
        kept = reference.stochastic_round(every.float(), torch.full(every.shape, random), dtype)
        assert torch.equal(kept.view(torch.int16), every.view(torch.int16))
    nan = torch.full((3,), float("nan"))
    assert reference.stochastic_round(nan, torch.tensor([0, 9, 65535]), dtype).isnan().all()


def test_elements_are_numbered_in_memory_order():
    """A dense tensor draws the same bits whatever its dimensions are called."""
    memory, online = torch.randn(2, 60).bfloat16()
    flat = memory.clone()
    shaped = memory.clone().view(3, 4, 5).permute(2, 0, 1)
    update([flat], [online], 0.5, rounding="stochastic", seed=1, step=1)
    update(
        [shaped], [online.view(3, 4, 5).permute(2, 0, 1)], 0.5,
        rounding="stochastic", seed=1, step=1,
    )  # fmt: skip
    assert torch.equal(shaped.permute(1, 2, 0).reshape(-1), flat)


@pytest.mark.parametrize("change", ["seed", "step", "index"])
def test_seed_step_and_index_change_the_bits(change):
    base = {"seed": 4, "step": 9}
    t, o = torch.randn(2, 400).bfloat16()
    lists = [[t.clone(), t.clone()] for _ in range(2)]
    update(lists[0], [o, o], 0.99, rounding="stochastic", **base)
    if change == "index":
        assert not torch.equal(*lists[0])
        return
    update(lists[1], [o, o], 0.99, rounding="stochastic", **{**base, change: 5})
    assert not torch.equal(lists[0][0], lists[1][0])


def test_half_teachers_do_not_stall(fused):
    """Momentum 0.99925 and a drifting student: plain bfloat16 stands still, stochastic rounding
    follows the float32 teacher in the mean over elements.
    """
    count, steps = 20000, 400
    student = torch.full((count,), 1.25, device=fused.device)
    start = torch.full((count,), 1.0, device=fused.device)
    plain, moving, exact = start.bfloat16(), start.bfloat16(), start.clone()
    for step in range(steps):
        ema_update_([plain], [student], 0.99925, backend=fused.name)
        ema_update_(
            [moving], [student], 0.99925, rounding="stochastic", seed=3, step=step,
            backend=fused.name,
        )  # fmt: skip
        ema_update_([exact], [student], 0.99925, backend=fused.name)
        if step in (99, 399):
            gone = exact[0].item() - 1.0
            mean = moving.double().mean().item() - 1.0
            deviation = moving.double().std().item() / count**0.5
            assert torch.equal(plain, start.bfloat16())
            assert abs(mean - gone) < 5 * deviation + 1e-4, (step, mean, gone)
    assert gone > 0.06


def test_nothing_to_do():
    update([], [], 0.5)
    empty = torch.randn(0, 3)
    update([empty], [torch.randn(0, 3)], 0.5)


def test_numpy_agrees_on_the_rounding_of_each_operation():
    """No contraction into a fused multiply-add, in an implementation of its own."""
    t, o = torch.randn(2, 1000)
    a, b, w = t.numpy(), o.numpy(), np.float32(1 - 0.99)
    expected = a + w * (b - a)
    update([t], [o], 0.99)
    assert np.array_equal(t.numpy(), expected)
    far, m = torch.randn(1000), np.float32(-0.2)
    expected = b + m * (b - far.numpy())
    update([far], [o], 0.2)
    assert np.array_equal(far.numpy(), expected)


def test_layouts_agree():
    for name, make in ema_tensors.LAYOUTS.items():
        t, o = make(6, 4, 5), make(6, 4, 5)
        expected = 0.9 * t.double() + 0.1 * o.double()
        update([t], [o], 0.9)
        torch.testing.assert_close(t.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
