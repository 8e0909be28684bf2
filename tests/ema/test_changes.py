"""What changes between two calls with the same lists or models is seen: nothing is remembered that
a tensor, a list or a module no longer is. Each call gives the reference's values, or the error that
a first call would give.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from vicreg_kernels.ema import EMA, ema_update_

COUNT = 6


@pytest.fixture
def on_its_device(fused):
    """The tensors that a test and its changes make lie where the backend runs."""
    with torch.device(fused.device):
        yield


def made():
    return [torch.randn(3, 4) for _ in range(COUNT)], [torch.randn(3, 4) for _ in range(COUNT)]


def update(targets, onlines, backend, **settings):
    """Against a plain interpolation of what the lists hold now."""
    expected = [
        torch.lerp(t.float(), o.float(), 0.25) for t, o in zip(targets, onlines, strict=True)
    ]
    ema_update_(targets, onlines, 0.75, backend=backend, **settings)
    for t, e in zip(targets, expected, strict=True):
        torch.testing.assert_close(t.detach().float(), e.detach(), rtol=1e-2, atol=1e-2)


def set_data(t, o):
    t[2].data = torch.randn(3, 4)
    o[3].data = torch.randn(3, 4).bfloat16()


def set_shape(t, o):
    """The memory, the number of elements and the tensor stay."""
    t[1].data, o[1].data = t[1].data.view(4, 3), o[1].data.view(4, 3)


def set_strides(t, o):
    t[1].data = t[1].data.t().contiguous().t()
    o[4].t_().data.copy_(torch.randn(4, 3))
    o[4].t_()


def resize(t, o):
    for z in (t[0], o[0]):
        z.resize_(5, 5).copy_(torch.randn(5, 5))


def set_storage(t, o):
    t[5].set_(torch.randn(40).untyped_storage(), 7, (3, 4), (4, 1))


def require_gradients(t, o):
    t[0].requires_grad_()
    o[1].requires_grad_()


def swap_entries(t, o):
    t[0], t[5], o[2] = t[5], t[0], torch.randn(3, 4)


def to_another_dtype(t, o):
    t[3], o[3] = t[3].to(torch.bfloat16), o[3].to(torch.float16)


def free_and_allocate(t, o):
    """Objects and memory are likely to lie where the old ones did."""
    shapes = [(4, 3), (3, 4), (12,), (1, 12), (2, 6), (3, 4)]
    t.clear(), o.clear()
    t += [torch.randn(shape) for shape in shapes]
    o += [torch.randn(shape) for shape in shapes]


CHANGES = (
    set_data, set_shape, set_strides, resize, set_storage, require_gradients, swap_entries,
    to_another_dtype, free_and_allocate,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_that_fits(change, fused, on_its_device):
    targets, onlines = made()
    for _ in range(2):
        update(targets, onlines, fused.name)
    change(targets, onlines)
    for _ in range(2):
        update(targets, onlines, fused.name)


def overlap(t, o):
    o[2].data = t[4].data


def overlap_itself(t, o):
    t[4].data = torch.randn(3, 1).expand(3, 4)


def another_shape(t, o):
    o[1].data = torch.randn(4, 3)


def another_device(t, o):
    o[5] = torch.empty(3, 4, device="meta")


def an_integer(t, o):
    t[2].data = torch.ones(3, 4, dtype=torch.int32)


def no_leaf(t, o):
    t[1] = torch.randn(3, 4, requires_grad=True) * 2


def tied(t, o):
    t[1] = t[0]


MISTAKES = {
    overlap: (ValueError, r"onlines\[2\].*overlaps targets\[4\]"),
    overlap_itself: (ValueError, r"targets\[4\].*do not share memory"),
    another_shape: (ValueError, r"onlines\[1\]: got shape"),
    another_device: (ValueError, r"onlines\[5\]: got device meta"),
    an_integer: (TypeError, r"targets\[2\]: got dtype torch.int32"),
    no_leaf: (ValueError, r"targets\[1\].*takes a leaf"),
    tied: (ValueError, r"targets\[1\].*overlaps targets\[0\]"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_a_mistake_in_a_later_call(mistake, fused, on_its_device):
    targets, onlines = made()
    update(targets, onlines, fused.name)
    mistake(targets, onlines)
    before = [t.detach().clone() for t in targets]
    error, said = MISTAKES[mistake]
    with pytest.raises(error, match=said):
        ema_update_(targets, onlines, 0.75, backend=fused.name)
    assert all(torch.equal(t, b) for t, b in zip(targets, before, strict=True))


def test_no_tensor_is_kept_alive(fused, on_its_device):
    targets, onlines = made()
    ema_update_(targets, onlines, 0.75, backend=fused.name)
    model = nn.Linear(3, 3)
    ema = EMA(model)
    ema.update(model)
    seen = [weakref.ref(z) for z in (*targets, *onlines, model.weight)]
    del targets, onlines
    model.weight = nn.Parameter(torch.ones(3, 3))
    gc.collect()
    assert not any(ref() is not None for ref in seen)


# ------------------------------------------------------------------------------------------ models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout()
        self.register_parameter("scale", None)


def check(ema: EMA, model: nn.Module) -> None:
    """One update at momentum 0: the teacher is the student's copy, under every name."""
    ema.update(model, 0.0)
    teacher = dict(ema.module.named_parameters(remove_duplicate=False))
    for name, z in model.named_parameters(remove_duplicate=False):
        assert torch.equal(teacher[name], z.to(teacher[name].dtype)), name


def replace_parameter(ema, model):
    model.first.weight = nn.Parameter(torch.full((3, 3), 7.0))


def replace_data(ema, model):
    model.first.weight.data = torch.full((3, 3), 7.0)
    ema.module.second.weight.data = torch.zeros(3, 3).bfloat16()


def load_by_assignment(ema, model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    ema.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()}, assign=True)


def tie_the_student(ema, model):
    model.second.weight = model.first.weight


def tie_and_untie(ema, model):
    for net in (model, ema.module):
        net.second.weight = net.first.weight
    check(ema, model)
    for net in (model, ema.module):
        net.second.weight = nn.Parameter(torch.randn(3, 3), requires_grad=net is model)


def untie_where_none_is_new(ema, model):
    """The names and the number of tensors stay; a teacher that was tied no longer is."""
    tie_and_untie(ema, model)
    with torch.no_grad():
        model.second.weight.add_(5.0)


def fill_an_absent_parameter(ema, model):
    for net in (model, ema.module):
        net.scale = nn.Parameter(torch.randn(3))


def add_to_a_module_without_tensors(ema, model):
    for net in (model, ema.module):
        net.drop.rate = nn.Parameter(torch.randn(2))


def replace_a_module(ema, model):
    model.second, ema.module.second = nn.Linear(3, 3), nn.Linear(3, 3)
    ema.module.second.requires_grad_(False)


def another_width(ema, model):
    model.second, ema.module.second = nn.Linear(3, 5), nn.Linear(3, 5)
    ema.module.second.requires_grad_(False)


def half_student(ema, model):
    model.bfloat16()


def swapped_names(ema, model):
    """The same parameters under each other's names."""
    a, b = model.first.weight, model.second.weight
    model.first.weight, model.second.weight = b, a


MODEL_CHANGES = (
    replace_parameter, replace_data, load_by_assignment, tie_the_student, tie_and_untie,
    untie_where_none_is_new, fill_an_absent_parameter, add_to_a_module_without_tensors,
    replace_a_module, another_width, half_student, swapped_names,
)  # fmt: skip


@pytest.mark.parametrize("change", MODEL_CHANGES, ids=lambda c: c.__name__)
def test_a_model_that_changes_between_updates(change):
    model = Net()
    ema = EMA(model)
    for _ in range(2):
        check(ema, model)
    change(ema, model)
    for _ in range(2):
        check(ema, model)


def test_another_student_and_copies_of_the_ema():
    model, other = Net(), Net()
    ema = EMA(model)
    check(ema, model)
    check(ema, other)
    twin = copy.deepcopy(ema)
    check(twin, model)
    assert torch.equal(ema.module.first.weight, other.first.weight), "the copy's own tensors"


def test_a_parameter_that_becomes_complex_or_an_integer():
    model = Net()
    ema = EMA(model)
    check(ema, model)
    for z in (torch.randn(3, 3, dtype=torch.complex64), torch.arange(9).view(3, 3)):
        for net in (model, ema.module):
            net.first.weight = nn.Parameter(z.clone(), requires_grad=False)
        with torch.no_grad():
            model.first.weight.add_(1)
        for _ in range(2):
            ema.update(model, 0.0)
            assert torch.equal(ema.module.first.weight, model.first.weight)
    for net in (model, ema.module):
        net.first.weight = nn.Parameter(torch.randn(3, 3))
    check(ema, model)
