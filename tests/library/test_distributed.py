"""Tier 6: what ranks exchange and how much, and that a rank in trouble stops all of them with a
message that names it, instead of leaving them waiting.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import gloo
from vicreg_kernels import VICRegLoss, distributed, variance_covariance, vicreg_loss
from vicreg_kernels.barlow import barlow_twins_loss
from vicreg_kernels.barlow import ranks as barlow_ranks
from vicreg_kernels.barlow.contract import Settings as BarlowSettings
from vicreg_kernels.core import dispatch
from vicreg_kernels.distributed import collectives
from vicreg_kernels.sigreg import sigreg_loss
from vicreg_kernels.vicreg import ranks as vicreg_ranks
from vicreg_kernels.vicreg.contract import Settings as VICRegSettings

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)
# Rows of all ranks, and D on both sides; the covariance comes in three chunks.
ROWS, WIDE, NARROW = 48, 80, 40
CHUNK = 16
TIMEOUT = timedelta(seconds=5)


class Counted:
    """Counts what this rank gives to collectives, (kind, bytes) each, and its products' flops."""

    def __init__(self) -> None:
        self.collectives: list[tuple[str, int]] = []

    @contextmanager
    def __call__(self):
        kept = dist.all_reduce, collectives.all_gather

        def all_reduce(value, **rest):
            self.collectives.append(("sum", value.numel() * value.element_size()))
            return kept[0](value, **rest)

        def all_gather(out, own, **rest):
            self.collectives.append(("gather", own.numel() * own.element_size()))
            return kept[1](out, own, **rest)

        dist.all_reduce, collectives.all_gather = all_reduce, all_gather
        try:
            with FlopCounterMode(display=False) as flops:
                yield
            self.flops = flops.get_total_flops()
        finally:
            dist.all_reduce, collectives.all_gather = kept


def count(forward, backward):
    """(collectives, flops) of each; the ops' bodies, as the counter does not look into ops."""
    first, second = Counted(), Counted()
    with first():
        saved = forward()
    with second():
        backward(*saved)
    return (first.collectives, first.flops), (second.collectives, second.flops)


def vicreg_counts(group, rows, dim, needed):
    x, y = (torch.randn(1, rows, dim) for _ in "xy")
    settings = VICRegSettings(1.0, 1e-4, True, (1.0, 0.5, 1.0), (25.0, 25.0, 1.0), "d")

    def backward(moments, rows, *gradients):
        wanted = tuple(z if needed else None for z in gradients)
        return vicreg_ranks.backward(torch.ones(1), x, y, moments, rows, wanted, group, settings)

    return count(lambda: vicreg_ranks.forward(x, y, needed, needed, group, settings)[1:], backward)


def barlow_counts(group, rows, dim, needed):
    x, y = (torch.randn(rows, dim) for _ in "xy")
    settings = ("barlow_twins", group, BarlowSettings(1e-5, 0.0, False, 5e-3))
    return count(
        lambda: barlow_ranks.forward(x, y, needed, needed, *settings)[1:],
        lambda *saved: barlow_ranks.backward(torch.ones(1), x, y, *saved, needed, needed, group),
    )


def counts(ranks):
    group = distributed.group_name(True)
    for chunked in (vicreg_ranks.ranks_squares, barlow_ranks):
        chunked.CHUNK_ROWS, chunked.CHUNK_ELEMENTS = CHUNK, 1
    return {
        (op.__name__, dim, needed): op(group, ROWS // ranks, dim, needed)
        for op in (vicreg_counts, barlow_counts)
        for dim in (WIDE, NARROW)
        for needed in (True, False)
    }


def attempt(call):
    """What a call ends in: its error's type and text, and the seconds."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def failures(rank):
    """Rank 1 is the one in trouble."""
    trouble = rank == 1
    late, lost = (dist.new_group(timeout=TIMEOUT) for _ in range(2))
    x, y = torch.randn(3, 6), torch.randn(3, 6)

    def loss(*views, group=True, **settings):
        return lambda: vicreg_loss(*(views or (x, y)), process_group=group, **settings)

    def weighed():
        views = x.clone().requires_grad_(), y
        (loss(*views)() * (2.0 if trouble else 1.0)).backward()

    def tangent():
        with forward_ad.dual_level():
            sigreg_loss(forward_ad.make_dual(x, y), process_group=True)

    calls = {
        "bad input": loss(x.long(), y) if trouble else loss(),
        "no rows": loss(x[:0], y[:0]) if trouble else loss(),
        "other D": loss(x[:, :5], y[:, :5]) if trouble else loss(),
        "other dtype": loss(x.bfloat16(), y.bfloat16()) if trouble else loss(),
        "other margin": loss(margin=2.0) if trouble else loss(),
        "other weight": loss(covariance_weight=2.0) if trouble else loss(),
        "other backend": loss(backend="reference") if trouble else loss(),
        "one view": (lambda: variance_covariance(x, process_group=True)) if trouble else loss(),
        "another loss": (lambda: barlow_twins_loss(x, y, process_group=True))
        if trouble
        else loss(),
        "fused backend": loss(backend="cpu"),
        "wrong group": loss(group="gloo"),
        "torch.func": lambda: torch.func.grad(lambda x: loss(x, y)())(x),
        "tangent": tangent,
        "none of it": loss(),
    }
    errors = {name: attempt(call) for name, call in calls.items()}
    dispatch.DEBUG = True
    errors["other cotangent"] = attempt(weighed)
    dispatch.DEBUG = False
    if not trouble:
        errors["late"] = attempt(loss(group=late))
    dist.barrier()
    if trouble:
        os._exit(0)
    errors["lost"] = attempt(loss(group=lost))
    return errors


def worker(rank, ranks):
    return counts(ranks)


def troubled(rank, ranks):
    return failures(rank)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.thorough)])
def counted(request, tmp_path_factory):
    """The number of ranks, and what each of them counted."""
    if request.param == 2:
        return 2, gloo.on_two("library.test_distributed")
    return request.param, gloo.run(request.param, tmp_path_factory.mktemp("ranks"), worker)


@pytest.fixture(scope="module")
def on_three(tmp_path_factory):
    return gloo.run(3, tmp_path_factory.mktemp("three"), troubled)


# What the other ranks' messages say.
TROUBLE = {
    "bad input": ["rank 1 failed", "torch.int64"],
    "no rows": ["rank 1 failed", "0 rows"],
    "other D": ["D: got 5 on rank 1 and 6 on rank 0"],
    "other dtype": ["dtype", "bfloat16", "rank 1", "float32"],
    "other margin": ["margin: got 2.0 on rank 1 and 1.0 on rank 0"],
    "other weight": ["weights", "2.0", "on rank 1"],
    "other backend": ["backend", "reference", "rank 1", "ranks"],
    "one view": ["views: got 1 on rank 1 and 2 on rank 0"],
    "another loss": ["op: got barlow_twins_loss on rank 1 and vicreg on"],
    "other cotangent": ["gradient", "[2.0] on rank 1"],
}


def surviving(errors):
    """The failures of ranks 0 and 2; rank 1 has ended."""
    assert errors[1] is None
    return [errors[rank] for rank in (0, 2)]


@pytest.mark.parametrize("name", TROUBLE)
def test_a_rank_in_trouble_stops_all(name, on_three):
    words = TROUBLE[name]
    for each in surviving(on_three):
        kind, message, seconds = each[name]
        assert kind == "RuntimeError", message
        assert message.startswith("vicreg: "), message
        for word in words:
            assert word in message
        assert seconds < gloo.TIMEOUT.total_seconds() / 2


def test_errors_of_all_ranks(on_three):
    """Told in the words of a single process; the group is good for the next call."""
    for each in surviving(on_three):
        for name in ("torch.func", "tangent"):  # a collective would drop the other ranks' part
            assert each[name][0] == "RuntimeError"
            assert each[name][1].startswith("process_group: got several ranks inside a transform")
        assert each["fused backend"][0] == "ValueError"
        assert "backend: got 'cpu', takes None or 'reference'" in each["fused backend"][1]
        assert each["wrong group"][0] == "TypeError"
        assert each["none of it"][:2] == ("", "")


@pytest.mark.parametrize("name", ["late", "lost"])
def test_a_rank_that_does_not_come(name, on_three):
    """Not called within the group's timeout, or ended: all others raise in about that time."""
    for each in surviving(on_three):
        kind, message, seconds = each[name]
        assert kind == "RuntimeError"
        assert "did not come" in message
        assert "1" in message.split("no sign of rank ")[1].split("(")[0]
        assert seconds < TIMEOUT.total_seconds() + 15


def message():
    return ("gather", distributed.MESSAGE_BYTES)


def thin(n, total, needed):
    """Operations with the four columns taken out of one view's Gram matrix, but for their return to
    it by baddbmm_, which the counter does not know.
    """
    taken = 4
    return 2 * taken * (total * n + total * taken + (taken * n if needed else 0))


@pytest.mark.parametrize("needed", [True, False])
def test_vicreg_gram(needed, counted):
    """Statistics, both views' rows and one number; products fall as 1 / ranks."""
    ranks, counts = counted
    n = ROWS // ranks
    for each in counts:
        (exchanged, flops), backward = each["vicreg_counts", WIDE, needed]
        statistics = 8 * (2 * 2 * WIDE + 1)
        assert exchanged == [
            message(),
            ("sum", statistics),
            ("gather", 4 * n * WIDE),
            ("gather", 4 * n * WIDE),
            ("sum", 8),
        ]
        products = 2 if needed else 1
        assert flops == 2 * (products * 2 * n * ROWS * WIDE + thin(n, ROWS, needed))
        assert backward == ([], 0)


@pytest.mark.parametrize("needed", [True, False])
def test_vicreg_covariance(needed, counted):
    """Statistics and the lower trapezoids of both views; products fall as 1 / ranks."""
    ranks, counts = counted
    n = ROWS // ranks
    ends = [min(begin + CHUNK, NARROW) for begin in range(0, NARROW, CHUNK)]
    areas = [end * (end - begin) for begin, end in zip((0, *ends), ends, strict=False)]
    assert len(areas) == 3
    for each in counts:
        (exchanged, flops), backward = each["vicreg_counts", NARROW, needed]
        statistics = 8 * (2 * 2 * NARROW + 1)
        chunks = [("sum", 4 * area) for area in areas]
        assert exchanged == [message(), ("sum", statistics), *chunks, *chunks]
        gradient = 2 * n * NARROW**2 if needed else 0
        assert flops == 2 * (2 * n * sum(areas) + gradient)
        assert backward == ([], 0)


@pytest.mark.parametrize("needed", [True, False])
def test_barlow(needed, counted):
    """Statistics, then both views' rows and column sums, or the correlation; products fall as
    1 / ranks.
    """
    ranks, counts = counted
    n = ROWS // ranks
    for each in counts:
        (exchanged, flops), backward = each["barlow_counts", WIDE, needed]
        rows, sums = ("gather", 4 * n * WIDE), 1 + (3 if needed else 1) * WIDE
        statistics = 8 * (2 * 2 * WIDE + 1)
        assert exchanged == [message(), ("sum", statistics), rows, rows, ("sum", 8 * sums)]
        assert flops == (4 if needed else 2) * 2 * n * ROWS * WIDE
        assert backward == ([], 0)

        (exchanged, flops), backward = each["barlow_counts", NARROW, needed]
        heights = [min(CHUNK, NARROW - begin) for begin in range(0, NARROW, CHUNK)]
        statistics = 8 * (2 * 2 * NARROW + 1)
        chunks = [("sum", 4 * height * NARROW) for height in heights]
        assert exchanged == [message(), ("sum", statistics), *chunks]
        assert flops == (3 if needed else 1) * 2 * n * NARROW**2
        assert backward == ([], 0)


def test_a_group_of_one_is_the_local_op(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        x, y = torch.randn(5, 9), torch.randn(5, 9)
        assert distributed.group_name(True) is None
        assert torch.equal(VICRegLoss(process_group=True)(x, y), VICRegLoss()(x, y))
        with pytest.raises(ValueError, match="at least 2"):
            vicreg_loss(x[:1], y[:1], process_group=True)
    finally:
        dist.destroy_process_group()


def test_no_default_group():
    x, y = torch.randn(5, 9), torch.randn(5, 9)
    with pytest.raises(RuntimeError, match=r"process_group: got True.*init_process_group"):
        vicreg_loss(x, y, process_group=True)
    assert torch.equal(vicreg_loss(x, y, process_group=False), vicreg_loss(x, y))
