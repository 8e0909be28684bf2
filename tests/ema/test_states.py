"""What an EMA does with tensors that change their shape, and with what cannot be averaged."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from vicreg_kernels import EMA


class Running(nn.Module):
    """A layer beside a buffer that its owner may replace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        self.register_buffer("seen", torch.zeros(4))


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("shape", [(9,), (), (1,), (2, 4)], ids=str)
def test_a_buffer_of_another_shape_is_refused_before_anything_moves(shape, buffers) -> None:
    student = Running()
    ema = EMA(student, 0.5, buffers=buffers, shadow_dtype=torch.bfloat16)
    ema.update(student)
    with torch.no_grad():
        student.layer.weight.add_(1.0)
    student.seen = torch.ones(shape)
    before = {k: z.clone() for k, z in ema.state_dict().items()}
    shadow = ema.shadow.layer.weight.clone()
    with pytest.raises(ValueError, match=r"^module: 'seen' has shape"):
        ema.update(student)
    for k, z in ema.state_dict().items():
        assert torch.equal(z, before[k]), k
    assert torch.equal(ema.shadow.layer.weight, shadow)
    student.seen = torch.full((4,), 7.0)  # mended, it goes on
    ema.update(student)
    assert ema.module.seen.tolist() == [7.0 if buffers == "copy" else 3.5] * 4
    assert int(ema.step) == 2


def test_a_buffer_that_grows_is_left_alone_where_buffers_are() -> None:
    student = Running()
    ema = EMA(student, 0.5, buffers="ignore")
    ema.update(student)
    student.seen = torch.ones(9)
    ema.update(student)
    assert ema.module.seen.tolist() == [0.0] * 4


class Extra(nn.Module):
    def __init__(self, extra: object) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(2, 2), extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, extra: object) -> None:
        self.extra = extra


EXTRA = [{"scale": 2.0}, 1.5, None, b"bytes", torch.arange(3), torch.rand(3), ["a list"]]


@pytest.mark.parametrize("extra", EXTRA, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("shadow", [None, torch.bfloat16], ids=str)
def test_extra_state_is_saved_and_loaded(extra, shadow) -> None:
    ema = EMA(Extra(extra), 0.9, shadow_dtype=shadow)
    ema.update(Extra(extra))
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = EMA(Extra("another"), 0.9, shadow_dtype=shadow)
    other.load_state_dict(torch.load(file, weights_only=False))
    for module in (other.module, *([] if shadow is None else [other.shadow])):
        loaded = module.extra
        assert torch.equal(loaded, extra) if isinstance(extra, torch.Tensor) else loaded == extra
    assert torch.equal(other.module.layer.weight, ema.module.layer.weight)


@pytest.mark.parametrize(
    "normalise",
    [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
    ids=["parametrization", "hook"],
)
def test_directions_of_spectral_norm_keep_their_norm(normalise) -> None:
    student = nn.Sequential(normalise(nn.Linear(6, 5)), nn.BatchNorm1d(5))
    ema = EMA(student, 0.5, buffers="average")
    for _ in range(3):
        student[0](torch.randn(4, 6))  # one more power iteration
        with torch.no_grad():
            next(student.parameters()).normal_()
        ema.update(student)
    directions = [z for name, z in ema.module.named_buffers() if name.endswith(("_u", "_v"))]
    assert len(directions) == 2
    for z in directions:
        torch.testing.assert_close(z.norm(), torch.ones(()))
    student[1].running_mean.fill_(2.0)
    ema.update(student)
    assert (ema.module[1].running_mean == 1.0).all(), "the others are averaged"
