"""`accumulate` puts an encoder's state back by owner between its two passes, and after an error."""

from __future__ import annotations

import copy
import random
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.library.test_accumulate import (
    DIM,
    FEATURES,
    assert_same_gradients,
    micro_batches,
    under_one_graph,
)
from vicreg_kernels import accumulate, vicreg_loss


class Stateful(nn.Module):
    """An encoder whose output depends on what its last calls left; each subclass keeps it so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(FEATURES, DIM, bias=False)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.start()

    def start(self) -> None: ...

    def forward(self, x):
        self.change(x.detach())
        return self.linear(x - self.offset())

    def offset(self):
        return self.mean


class AssignsABuffer(Stateful):
    def change(self, x):
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0) + x.std(0)


class MovesABuffer(Stateful):
    def change(self, x):
        self.mean.mul_(0.5).add_(x.std(0))


class MakesABufferLate(Stateful):
    def change(self, x):
        if not hasattr(self, "late"):
            self.register_buffer("late", x.std(0))
        self.late = self.late * 0.8

    def offset(self):
        return self.late


class KeepsAPlainTensor(Stateful):
    def start(self):
        self.plain = torch.zeros(FEATURES)

    def change(self, x):
        self.plain += x.std(0)

    def offset(self):
        return self.plain


class AssignsAPlainTensor(KeepsAPlainTensor):
    def change(self, x):
        self.plain = self.plain + x.std(0)


class Counts(Stateful):
    def start(self):
        self.calls = 0

    def change(self, x):
        self.calls += 1

    def offset(self):
        return torch.linspace(0, self.calls, FEATURES) ** 2


class Queues(Stateful):
    def start(self):
        self.queue = deque(maxlen=3)
        self.nested = {"of": [torch.zeros(FEATURES)]}

    def change(self, x):
        self.queue.append(x.std(0))
        self.nested["of"][0] += x.std(0)

    def offset(self):
        return sum(self.queue) * len(self.queue) + self.nested["of"][0]


class DrawsFromItsOwnGenerator(Stateful):
    def start(self):
        self.generator = torch.Generator().manual_seed(3)

    def __deepcopy__(self, memo):
        return type(self)()

    def change(self, x):
        self.drawn = torch.rand(FEATURES, generator=self.generator)

    def offset(self):
        return self.drawn


class DrawsFromPythonAndNumpy(Stateful):
    def change(self, x):
        self.drawn = torch.arange(FEATURES) * random.random() * np.random.rand()  # noqa: NPY002

    def offset(self):
        return self.drawn


KINDS = Stateful.__subclasses__() + KeepsAPlainTensor.__subclasses__()
# A loss that an offset of all rows changes, unlike VICReg's variance and covariance.
SIZES = (4, 6, 2)


def loss(x, y):
    return vicreg_loss(x, y) + x.square().mean() + (y * x.cos()).mean()


def seeded() -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_that_of_one_pass(kind):
    model = nn.Sequential(kind(), nn.Tanh())
    whole = copy.deepcopy(model)
    seeded()
    value = accumulate(loss, model, micro_batches(*SIZES))
    seeded()
    expected = under_one_graph(loss, whole, micro_batches(*SIZES))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert_same_gradients(model, whole)
    torch.testing.assert_close(model[0].offset(), whole[0].offset(), rtol=1e-6, atol=0)
    assert model.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["loss", "second pass"])
def test_after_an_error_the_state_is_what_it_was(kind, where):
    model = kind()
    model(micro_batches(3)[0][0])  # so that a late tensor is there
    kept = model.offset()
    before = copy.deepcopy(kept)
    calls = iter(range(100))

    def fails(x):
        if where == "second pass" and next(calls) == 8:
            raise OSError("second pass")
        return model(x)

    def wrong(x, y):
        if where == "loss":
            raise OSError("loss")
        return loss(x, y)

    state = {k: v for k, v in model.__dict__.items() if isinstance(v, (int, torch.Tensor))}
    bound = dict(model._buffers)
    with pytest.raises(OSError, match=where):
        accumulate(wrong, fails, micro_batches(*SIZES), modules=[model])
    assert torch.equal(model.offset(), before)
    assert all(model.__dict__[name] is value for name, value in state.items())
    assert all(model._buffers[name] is value for name, value in bound.items())


def test_state_of_a_bound_method_and_of_a_partial():
    class Encoder(AssignsABuffer):
        def encode(self, x, factor):
            return self(x) * factor

    model = Encoder()
    whole = copy.deepcopy(model)
    accumulate(loss, partial(model.encode, factor=2.0), micro_batches(*SIZES))
    under_one_graph(loss, lambda x: whole(x) * 2.0, micro_batches(*SIZES))
    assert_same_gradients(model, whole)


class Box:
    value = 0.0


@pytest.mark.parametrize("amp", [False, True])
def test_state_that_is_not_kept_is_an_error(amp):
    """An object of the user's own is out of reach; its effect on the embeddings is not."""

    class Hidden(Stateful):
        def start(self):
            self.box = Box()

        def change(self, x):
            self.box.value += 0.2

        def offset(self):
            return torch.full((FEATURES,), self.box.value)

    with (
        torch.autocast("cpu", enabled=amp),
        pytest.raises(RuntimeError, match=r"micro_batches\[0\] in the second pass"),
    ):
        accumulate(loss, Hidden(), micro_batches(*SIZES))


def test_state_of_a_module_that_is_not_named_is_an_error():
    model = AssignsABuffer()
    with pytest.raises(RuntimeError, match="modules="):
        accumulate(loss, lambda x: model(x), micro_batches(*SIZES))


def test_embeddings_that_are_not_finite_are_left_to_the_scaler():
    model = nn.Linear(FEATURES, DIM)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    value = accumulate(lambda x, y: (x * y).mean(), model, micro_batches(*SIZES))
    assert not value.isfinite()


def test_rounding_between_the_passes_is_no_error():
    """Kernels that differ with and without a graph, as compiled ones do."""
    model = nn.Linear(FEATURES, DIM)

    def rounded(x):
        z = model(x)
        return z if torch.is_grad_enabled() else z.double().float() * (1 + 3e-7)

    accumulate(loss, rounded, micro_batches(*SIZES), modules=[model])


def test_what_cannot_be_repeated_is_refused_by_name():
    with pytest.raises(ValueError, match=r"encoder: LazyLinear\.weight has no shape"):
        accumulate(loss, nn.Sequential(nn.LazyLinear(DIM)), micro_batches(*SIZES))
    with pytest.raises(TypeError, match="modules: got str at 0"):
        accumulate(loss, nn.Linear(FEATURES, DIM), micro_batches(*SIZES), modules=["x"])
    model = parametrizations.orthogonal(nn.Linear(FEATURES, DIM))
    with parametrize.cached(), pytest.raises(RuntimeError, match="cached"):
        accumulate(loss, model, micro_batches(*SIZES))
    accumulate(loss, model, micro_batches(*SIZES))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_static_graph_is_refused_by_name(one_rank):
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(FEATURES, DIM), static_graph=True)
    for model in (ddp, nn.Sequential(ddp)):
        with pytest.raises(ValueError, match="static_graph=True"):
            accumulate(loss, model, micro_batches(*SIZES))


def test_a_wrapped_part_of_the_encoder(one_rank):
    part = AssignsABuffer()
    model = nn.Sequential(nn.parallel.DistributedDataParallel(part), nn.Tanh())
    whole = nn.Sequential(copy.deepcopy(part), nn.Tanh())
    for _ in range(2):
        accumulate(loss, model, micro_batches(*SIZES))
        under_one_graph(loss, whole, micro_batches(*SIZES))
    assert_same_gradients(model, whole)


def test_fully_sharded_parameters(one_rank):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(AssignsABuffer(), nn.Tanh(), nn.Linear(DIM, DIM, bias=False))
    whole = copy.deepcopy(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        accumulate(loss, model, micro_batches(*SIZES))
        under_one_graph(loss, whole, micro_batches(*SIZES))
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-5, atol=1e-7)
