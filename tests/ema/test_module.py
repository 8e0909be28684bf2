"""The EMA module: schedules, buffers, shadows, wrappers, state, copies."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from vicreg_kernels.ema import EMA, ema_update_


class Net(nn.Module):
    """Batch statistics, an integer and a non-persistent buffer, a tied parameter, a frozen one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.second = nn.Linear(4, 4, dtype=dtype)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
        self.register_buffer("table", torch.randn(2, dtype=dtype), persistent=False)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


def train(model: nn.Module, seed: int) -> None:
    """Stands for a step of an optimizer and of the batch norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for z in (*model.parameters(), *model.buffers()):
            if z.is_floating_point():
                z.add_(torch.randn(z.shape, generator=generator).to(z))
            else:
                z.add_(1)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """By name, tied ones under each of theirs."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    return {name: z.detach().clone() for name, z in named}


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_teacher_starts_as_a_copy():
    model = Net()
    ema = EMA(model)
    assert_equal(ema.module, model)
    assert not any(z.requires_grad for z in ema.parameters())
    assert ema.module.second.weight is ema.module.first.weight
    train(model, 0)
    assert not torch.equal(ema.module.norm.running_mean, model.norm.running_mean)
    x = torch.randn(5, 4)
    ema.eval()
    assert torch.equal(ema(x), ema.module(x))
    assert model.training


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize("shadow", [None, torch.bfloat16])
def test_update(buffers, shadow):
    model = Net()
    ema = EMA(model, 0.9, buffers=buffers, shadow_dtype=shadow)
    expected = {k: z.double() for k, z in tensors(model).items()}
    names = dict(model.named_parameters(remove_duplicate=False))
    for step in range(3):
        train(model, step)
        for name, z in tensors(model).items():
            averages = name in names or (buffers == "average" and z.is_floating_point())
            if averages:
                expected[name] = 0.9 * expected[name] + 0.1 * z.double()
            elif buffers != "ignore":
                expected[name] = z.double()
        ema.update(model)
    assert ema.step == 3
    for name, z in tensors(ema.module).items():
        torch.testing.assert_close(z.double(), expected[name], rtol=1e-6, atol=1e-6, msg=name)
    if shadow is not None:
        assert all(z.dtype == shadow for z in ema.shadow.parameters())
        for name, z in tensors(ema.shadow).items():
            assert torch.equal(z, tensors(ema.module)[name].to(z.dtype)), name
        for z, own in zip(ema.shadow.buffers(), model.buffers(), strict=True):
            assert z.dtype == own.dtype


def test_a_float32_teacher_of_a_bfloat16_student():
    model = Net(torch.bfloat16)
    ema = EMA(model, 0.99925, shadow_dtype=torch.bfloat16)
    assert {z.dtype for z in ema.module.parameters()} == {torch.float32}
    before = ema.module.first.weight.clone()
    train(model, 0)
    ema.update(model)
    exact = torch.lerp(before, model.first.weight.float(), 1 - 0.99925)
    torch.testing.assert_close(ema.module.first.weight, exact, rtol=1e-6, atol=1e-7)
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    assert ema(x).dtype == torch.bfloat16
    assert EMA(model, dtype=None).module.first.weight.dtype == torch.bfloat16


def test_a_half_teacher_with_stochastic_rounding():
    """The seeds are the steps: two EMAs agree, and the mean follows float32."""
    model = nn.Linear(100, 100).bfloat16()
    settings = {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 5}
    one, two, exact = (
        EMA(model, 0.999, **settings),
        EMA(model, 0.999, **settings),
        EMA(model, 0.999),
    )
    stalled = EMA(model, 0.999, dtype=torch.bfloat16)
    start = one.module.weight.float().mean()
    with torch.no_grad():
        model.weight.add_(0.1)
    for _ in range(60):
        for ema in (one, two, exact, stalled):
            ema.update(model)
    assert torch.equal(one.module.weight, two.module.weight)
    gone = exact.module.weight.mean() - start
    assert (one.module.weight.float().mean() - start) == pytest.approx(gone.item(), rel=0.05)
    assert (stalled.module.weight.float().mean() - start) < 0.5 * gone


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule):
    ema = EMA(nn.Linear(2, 2), 0.99, schedule=schedule, final_momentum=1.0, total_steps=8)
    for step in range(12):
        part = min(step / 8, 1.0)
        expected = {
            "constant": 0.99,
            "linear": 0.99 + 0.01 * part,
            "cosine": 1.0 - 0.01 * (1 + math.cos(math.pi * part)) / 2,
        }[schedule]
        assert ema.momentum() == pytest.approx(expected, rel=1e-12)
        on_device = ema.schedule.at_tensor(ema.step)
        assert on_device.dtype == torch.float64
        assert on_device.item() == pytest.approx(expected, rel=1e-12)
        assert 0 <= on_device.item() <= 1
        ema.update(nn.Linear(2, 2))


def test_the_published_linear_schedule():
    """I-JEPA: 0.996 + i (1 - 0.996) / steps for update i."""
    model, steps = nn.Linear(3, 3), 20
    ema = EMA(model, 0.996, schedule="linear", total_steps=steps)
    weight = model.weight.detach().clone()
    for i in range(steps):
        train(model, i)
        m = 0.996 + i * (1.0 - 0.996) / steps
        weight.mul_(m).add_(model.weight.detach(), alpha=1 - m)
        ema.update(model)
    torch.testing.assert_close(ema.module.weight, weight, rtol=1e-6, atol=1e-6)


def test_an_update_with_a_momentum_of_its_own():
    model = nn.Linear(3, 3)
    ema = EMA(model)
    train(model, 0)
    ema.update(model, momentum=0.0)
    assert torch.equal(ema.module.weight, model.weight)
    train(model, 1)
    ema.update(model, momentum=torch.tensor(1.0))
    assert not torch.equal(ema.module.weight, model.weight)
    assert ema.step == 2


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "data parallel":
        return nn.DataParallel(model)
    if kind == "both":
        return torch.compile(nn.DataParallel(model), backend="eager")
    model.first = torch.compile(model.first, backend="eager")  # as block by block
    return model


@pytest.mark.parametrize("kind", ["compiled", "data parallel", "both", "inner"])
@pytest.mark.parametrize("made", ["before", "after"])
def test_wrapped_students(kind, made):
    model = Net()
    plain = copy.deepcopy(model)
    if made == "before":
        ema = EMA(model, 0.9)
        student = wrapped(kind, model)
    else:
        student = wrapped(kind, model)
        ema = EMA(student, 0.9)
    expected = EMA(plain, 0.9)
    train(student, 3)
    train(plain, 3)
    ema.update(student)
    expected.update(plain)
    parameters = [z for z in ema.module.parameters()]
    for a, b in zip(parameters, expected.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_complex_parameters():
    class Rotation(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    model = Rotation()
    ema = EMA(model, 0.9)
    before = ema.module.phase.clone()
    train_by = torch.randn(4, dtype=torch.complex64)
    with torch.no_grad():
        model.phase.add_(train_by)
    ema.update(model)
    torch.testing.assert_close(ema.module.phase.detach(), before + 0.1 * train_by)


def followed(**settings) -> tuple[Net, EMA]:
    model = Net()
    ema = EMA(model, 0.9, schedule="linear", total_steps=10, **settings)
    for step in range(4):
        train(model, step)
        ema.update(model)
    return model, ema


@pytest.mark.parametrize("shadow", [None, torch.bfloat16])
@pytest.mark.parametrize("assign", [False, True])
def test_state_round_trip(shadow, assign):
    model, ema = followed(shadow_dtype=shadow)
    state = ema.state_dict()
    assert set(state) == {"step", *(f"module.{key}" for key in model.state_dict())}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.manual_seed(7)
    other = EMA(Net(), 0.9, schedule="linear", total_steps=10, shadow_dtype=shadow)
    other.module.table.copy_(ema.module.table)  # not part of a state
    if shadow is not None:
        other.shadow.table.copy_(ema.shadow.table)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert other.step == 4
    for one in (ema, other):
        one.update(model)
    assert_equal(ema, other)


def test_state_inside_another_module():
    _, ema = followed(shadow_dtype=torch.bfloat16)
    state = nn.ModuleDict({"teacher": ema}).state_dict()
    assert not any("shadow" in key for key in state)
    other = nn.ModuleDict({"teacher": EMA(Net(), shadow_dtype=torch.bfloat16)})
    other.load_state_dict(state)
    assert other["teacher"].step == 4
    assert torch.equal(other["teacher"].shadow.first.weight, ema.shadow.first.weight)


def test_state_of_other_emas_and_of_a_model():
    _, ema = followed()
    bare = ema.module.state_dict()
    forms = {
        "timm": ({f"module.{k}": v for k, v in bare.items()}, 0),
        "averaged": (
            {f"module.{k}": v for k, v in bare.items()} | {"n_averaged": torch.tensor(9)},
            9,
        ),
        "averaged around a distributed one": (
            {f"module.module.{k}": v for k, v in bare.items()} | {"n_averaged": torch.tensor(3)},
            3,
        ),
        "compiled": ({f"_orig_mod.{k}": v for k, v in bare.items()}, 0),
        "bare": (bare, 0),
    }
    for name, (state, step) in forms.items():
        other = EMA(Net(), shadow_dtype=torch.float16)
        other.load_state_dict(state)
        assert other.step == step, name
        for key, z in other.module.state_dict().items():
            assert torch.equal(z, bare[key]), (name, key)
        assert torch.equal(other.shadow.first.weight, bare["first.weight"].half())


def test_state_that_does_not_fit_is_an_error():
    _, ema = followed()
    state = ema.state_dict()
    other = EMA(Net())
    lacking = {k: v for k, v in state.items() if k != "module.first.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*module.first.weight"):
        other.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*module.third"):
        other.load_state_dict({**state, "module.third": torch.ones(1)})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate):
    model, ema = followed(shadow_dtype=torch.bfloat16, buffers="average")
    other = duplicate(ema)
    train(model, 9)
    assert_equal(ema, other)
    for one in (ema, other):
        one.update(model)
    assert_equal(ema, other)
    assert other.state_dict().keys() == ema.state_dict().keys()
    assert "cosine" not in repr(other)
    assert "linear" in repr(other)


def test_parameters_that_are_replaced():
    """Optimizers that swap .data, and modules that swap a whole Parameter, are seen."""
    model = nn.Linear(2, 2)
    ema = EMA(model)
    ema.update(model)
    model.weight.data = torch.full((2, 2), 5.0)
    ema.update(model, 0.0)
    assert ema.module.weight.eq(5).all()
    model.weight = nn.Parameter(torch.full((2, 2), 6.0))
    ema.module.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    ema.update(model, 0.0)
    assert ema.module.weight.eq(6).all()


def test_a_module_without_parameters():
    ema = EMA(nn.ReLU())
    ema.update(nn.ReLU())
    assert ema.step == 1
    assert ema(torch.tensor(-1.0)) == 0


def test_the_class_and_the_function_agree():
    model = Net()
    ema = EMA(model, 0.7)
    weights = [z.detach().clone() for z in model.parameters()]
    train(model, 1)
    ema.update(model)
    ema_update_(weights, list(model.parameters()), 0.7)
    for a, b in zip(weights, ema.module.parameters(), strict=True):
        assert torch.equal(a, b)
