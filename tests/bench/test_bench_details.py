"""What a record holds besides times: the distance from float64, and the shares of a step."""

from __future__ import annotations

import pytest
import torch

from bench import accuracy, adaln, attention, ema, measure
from bench.case import Case, Plan
from tests.helpers.bench_fake import CPU, fake_fixture, fake_op, go, read  # noqa: F401
from vicreg_kernels import ema_update_, prediction_loss


def rounding_plan(device, dtype, backend) -> Plan:
    """Its result is the input: in half precision the error is that of the rounding."""
    x = torch.randn(1000, device=device).to(dtype)
    return Plan({"ours": lambda: {"out": [x, x[:0].sum()]}}, backend or "cpu", 0, 0)


def silent_plan(device, dtype, backend) -> Plan:
    return Plan({"ours": lambda: None}, backend or "cpu", 0, 0)


def test_the_distance_is_of_the_worst_result():
    exact = [torch.tensor([1.0, -4.0]), torch.tensor([100.0])]
    got = [torch.tensor([1.0, -4.2]), torch.tensor([101.0])]
    assert accuracy.distance(got, exact) == pytest.approx(0.05)
    assert accuracy.distance(exact, exact) == 0
    with pytest.raises(ValueError, match="no results"):
        accuracy.distance([], [])
    with pytest.raises(ValueError, match="no results"):
        accuracy.distance(got[:1], exact)


def test_the_error_is_recorded_where_asked(fake, tmp_path, capsys):
    fake(fake_op(one=Case("one", rounding_plan, {}), none=Case("none", silent_plan, {})))
    options = ("--cases", "one,none", "--dtype", "float32,bfloat16", "--output", tmp_path)
    assert go(*options, "--accuracy") == 0
    (run_,) = read(tmp_path / "fake.json")["runs"]
    errors = {(row["case"], row["dtype"]): row["error"] for row in run_["rows"]}
    assert errors["one", "float32"] == 0
    assert 2**-11 < errors["one", "bfloat16"] < 2**-8
    assert (errors["none", "float32"], errors["none", "bfloat16"]) == (None, None)
    assert "no accuracy of none float32 ours: ValueError" in capsys.readouterr().err
    assert go(*options) == 0
    (run_,) = read(tmp_path / "fake.json")["runs"]
    assert {row["error"] for row in run_["rows"]} == {None}


@pytest.mark.parametrize(
    "case", [adaln.CASES["norm_128x16x1x192"], attention.CASES["vjepa2_vitg_120-381of2048_d64"]]
)
def test_a_case_draws_the_same_inputs_in_every_dtype(case):
    assert accuracy.error(case, "reference", CPU, "float32") < 1e-4


def test_shares_are_told_by_op():
    weight = torch.randn(256, 256, requires_grad=True)
    x, target = torch.randn(2, 512, 256), torch.randn(2, 512, 256)
    index = torch.arange(512).expand(2, -1)
    teacher = [torch.zeros(256, 256)]

    def step():
        loss = prediction_loss(x @ weight, target, index, kind="l1")
        torch.autograd.grad(loss, weight)
        ema_update_(teacher, [weight.detach()], 0.9)

    found = measure.shares(step, CPU)
    assert sum(found.values()) == pytest.approx(1)
    assert {"tokens", "torch: linear layers and convolution", "rest"} <= found.keys()
    assert all(0 <= share <= 1 for share in found.values())
    assert list(found)[-1] == "rest"


def test_a_step_of_several_ops_records_its_shares(fake, tmp_path):
    def build(device, dtype, backend) -> Plan:
        weight = torch.randn(64, 64, dtype=dtype)
        steps = {"ours": lambda: weight @ weight, "eager": lambda: weight @ weight}
        return Plan(steps, "cpu", 0, 0, shares=True)

    fake(fake_op(only=Case("only", build, {})))
    assert go("--output", tmp_path) == 0
    (run_,) = read(tmp_path / "fake.json")["runs"]
    for row in run_["rows"]:
        assert row["shares"].keys() == {"torch: linear layers and convolution", "rest"}


@pytest.mark.parametrize(("gflops", "edge"), [(100.0, 2048), (0.1, 1024), (0.01, 256)])
def test_the_rate_of_a_slow_type_is_of_a_smaller_product(gflops, edge, monkeypatch):
    edges = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: edges.append(len(a)))

    def clock(step):
        before = len(edges)
        step()
        return 2 * edges[-1] ** 3 / gflops / 1e6 if len(edges) > before else 1.0

    monkeypatch.setattr(measure, "make_clock", lambda device: clock)
    found = measure.ceilings(CPU, torch.bfloat16)
    assert edges[-8:] == [edge] * 8
    assert edge == 2048 or max(edges) == edge
    assert found["matmul_tflops"] == pytest.approx(gflops / 1e3)


def test_the_accuracy_of_an_update_in_place(monkeypatch):
    """A step of EMA returns what it has changed."""
    monkeypatch.setattr(ema, "parameter_shapes", lambda *size: [(5, 3), (7,)])
    case = ema.CASES["vit_b"]
    assert accuracy.error(case, "reference", CPU, "float64") == 0
    assert 0 < accuracy.error(case, "reference", CPU, "float32") < 1e-6
    assert 1e-4 < accuracy.error(case, "reference", CPU, "bfloat16") < 1e-1
