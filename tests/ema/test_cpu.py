"""Tier 2: the EMA's CPU kernel gives the reference's bits, whatever the mix of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ema import tensors as ema_tensors
from tests.ema.tensors import FUSED, LAYOUTS, MOMENTA, ROUNDINGS, assert_matches_reference
from vicreg_kernels.core import dispatch
from vicreg_kernels.ema import ema_update_

pytestmark = pytest.mark.skipif(
    dispatch.missing("cpu", "cpu", torch.float32) is not None, reason="the CPU library is not built"
)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_mix_of_dtypes(momentum, rounding):
    lists = ema_tensors.every_dtype([(), (1,), (7,), (3, 5), (2, 3, 4), (513,), (1031,)])
    assert_matches_reference("cpu", *lists, momentum, rounding=rounding, seed=8, step=5)


sizes = st.lists(st.integers(0, 9), min_size=0, max_size=4) | st.lists(
    st.integers(1, 700), min_size=1, max_size=2
)


@st.composite
def tensor_lists(draw):
    """A list of up to 8 tensors of any shapes, dtypes and layouts, with shadows or without."""
    shadows = draw(st.booleans())
    lists = ([], [], [])
    torch.manual_seed(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(0, 8))):
        shape = draw(sizes)
        scale = draw(st.sampled_from([1.0, 1e-6, 1e4]))
        for kept in lists[: 3 if shadows else 2]:
            layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
            kept.append(ema_tensors.cast(layout(*shape) * scale, draw(st.sampled_from(FUSED))))
    return lists


@given(
    tensor_lists(),
    st.sampled_from(MOMENTA) | st.floats(0.0, 1.0),
    st.sampled_from(ROUNDINGS),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**48 - 1),
    st.booleans(),
)
@settings(max_examples=150)
def test_random_lists(lists, momentum, rounding, seed, step, as_tensor):
    if as_tensor:
        momentum, step = torch.tensor(momentum, dtype=torch.float64), torch.tensor(step)
    assert_matches_reference("cpu", *lists, momentum, rounding=rounding, seed=seed, step=step)


@pytest.mark.parametrize("count", [511, 512, 513, 65535, 65536, 66000])
def test_sizes_about_blocks_and_threads(count):
    lists = [[torch.randn(count), torch.randn(count + 1)] for _ in range(2)]
    assert_matches_reference("cpu", *lists, [], 0.996)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FUSED)
def test_a_streamed_shadow(dtype, offset):
    """So large that shadows go past the caches; with a tail, aligned and not."""
    count = (1 << 22) + 11
    target, online = torch.randn(count), torch.randn(count).bfloat16()
    shadow = torch.empty(count + offset, dtype=dtype)[offset:]
    expected = torch.lerp(target, online.float(), 1 - 0.99)
    ema_update_([target], [online], 0.99, shadows=[shadow], backend="cpu")
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(shadow, target.to(dtype))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_any_number_of_threads_gives_the_same_bits(rounding):
    count = torch.get_num_threads()
    lists = ema_tensors.every_dtype([(129, 130), (40000,)])
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            targets, copies = ema_tensors.again(lists[0]), ema_tensors.again(lists[2])
            ema_update_(
                targets, lists[1], 0.9, shadows=copies, rounding=rounding, step=1, backend="cpu"
            )
            runs.append(targets + copies)
    finally:
        torch.set_num_threads(count)
    for other in runs[1:]:
        ema_tensors.assert_same_bits(other, runs[0], "threads")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nan_and_inf(bad, rounding):
    targets, onlines, copies = ema_tensors.every_dtype([(9,), (40,)], layouts=["contiguous"])
    for t, o in zip(targets, onlines, strict=True):
        t[3], o[5], t[7], o[7] = bad, bad, bad, -bad
    assert_matches_reference("cpu", targets, onlines, copies, 0.9, rounding=rounding, step=1)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_large_and_tiny_halves(rounding):
    """Overflow to infinity, and results below the halves' normal range."""
    for scale in (65504.0, 2.0**-14, 2.0**-20, 2.0**-24, 2.0**-130):
        for dtype in FUSED:
            t, o = ((torch.rand(2, 300) * 2 - 1) * scale).to(dtype)
            wide = torch.rand(300) * scale * 3
            assert_matches_reference("cpu", [t], [o], [], 0.7, rounding=rounding, step=1)
            assert_matches_reference("cpu", [t], [wide], [], 0.7, rounding=rounding, step=1)


def test_many_dimensions():
    """More than any parameter has, none of which merge."""
    shape = (2, 1, 3, 2, 2, 2, 3, 2, 2)
    lists = [[LAYOUTS[name](*shape)] for name in ("spread", "permuted", "contiguous")]
    assert_matches_reference("cpu", *lists, 0.9)


def test_a_shared_and_an_expanded_online():
    """Read only, so they may overlap."""
    online = torch.randn(6)
    targets = [torch.randn(6), torch.randn(6), torch.randn(4, 6)]
    assert_matches_reference("cpu", targets, [online, online, online.expand(4, 6)], [], 0.9)
