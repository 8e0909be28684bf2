"""Steps of every module on random shapes, for the soak: each makes a module, calls it forward and
backward, and drops it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import vicreg_kernels as kernels
from tests.fuzz.inputs import Draw


def _leaf(r: Draw, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=r.choice((torch.float32, torch.bfloat16))).requires_grad_()


def _two(r: Draw) -> tuple[int, int]:
    return r.randint(2, 33), r.randint(2, 33)


def _pair(r: Draw) -> tuple[Tensor, Tensor]:
    shape = _two(r)
    x = _leaf(r, *shape)
    return x, torch.randn_like(x).requires_grad_()


def vicreg(r: Draw) -> None:
    loss = kernels.VICRegLoss(convention=r.choice(("vicreg", "lightly")), margin=r.random())
    loss(*_pair(r)).backward()


def many_views(r: Draw) -> None:
    shape = _two(r)
    views = [_leaf(r, *shape).float() for _ in range(r.randint(3, 5))]
    kernels.VICRegLoss(margin=r.random())(views).backward()


def projector(r: Draw) -> None:
    rows, features = _two(r)
    module = kernels.Projector(features, [r.randint(1, 20) for _ in range(r.randint(1, 3))])
    module(torch.randn(rows, features)).sum().backward()


def vcreg(r: Draw) -> None:
    kernels.VCRegLoss(margin=r.random())(_leaf(r, *_two(r))).backward()


def barlow(r: Draw) -> None:
    kernels.BarlowTwinsLoss(lambd=r.random())(*_pair(r)).backward()


def sigreg(r: Draw) -> None:
    kernels.SIGRegLoss(r.randint(1, 40), seed=r.randrange(1000))(_leaf(r, *_two(r))).backward()


def lejepa(r: Draw) -> None:
    kernels.LeJEPALoss(slices=r.randint(1, 40))(_leaf(r, 3, *_two(r))).backward()


def vicregl(r: Draw) -> None:
    batch, dim, height, width = (r.randint(2, 5) for _ in range(4))
    embeddings = [torch.randn(batch, dim).requires_grad_() for _ in range(2)]
    maps = [torch.randn(batch, height, width, dim).requires_grad_() for _ in range(2)]
    grids = [torch.rand(batch, height, width, 2) for _ in range(2)]
    loss = kernels.VICRegLLoss(num_matches=(2, 1), fast_vc_reg=r.chance(0.5))
    loss(embeddings, maps, grids).backward()


def attention(r: Draw) -> None:
    module, tokens = kernels.MaskedAttention(32, 2), r.randint(1, 20)
    mask = r.choice((None, kernels.FrameCausal(r.randint(1, 5))))
    rope = kernels.Rope3d((tokens, r.randint(1, 50), r.randint(1, 50)))
    module(torch.randn(r.randint(1, 4), tokens, 32), mask, rope).sum().backward()


def prediction(r: Draw) -> None:
    samples, tokens, dim = r.randint(1, 5), r.randint(1, 20), r.randint(1, 33)
    index = torch.stack([torch.randperm(tokens)[: r.randint(1, 1)] for _ in range(samples)])
    pred = _leaf(r, samples, index.shape[1], dim)
    loss = kernels.PredictionLoss(r.choice(("l1", "smooth_l1", "mse", "cosine")))
    loss(pred, torch.randn(samples, tokens, dim), index).backward()


def adaln(r: Draw) -> None:
    dim, frames, tokens = r.randint(1, 33), r.randint(1, 4), r.randint(1, 20)
    module = kernels.AdaLN(dim, 3)
    x, condition = torch.randn(frames, tokens, dim), torch.randn(frames, 3)
    module(x.requires_grad_(), condition, torch.sin, torch.cos).sum().backward()


def ema(r: Draw) -> None:
    student = nn.Sequential(nn.Linear(*_two(r)), nn.BatchNorm1d(3))
    average = kernels.EMA(student, r.random(), shadow_dtype=r.choice((None, torch.bfloat16)))
    for _ in range(2):
        average.update(student)


def accumulated(r: Draw) -> None:
    dim = r.randint(2, 33)
    encoder = nn.Sequential(nn.Linear(dim, 5), nn.BatchNorm1d(5))
    batches = [(torch.randn(4, dim), torch.randn(4, dim)) for _ in range(r.randint(1, 3))]
    kernels.accumulate(kernels.VICRegLoss(), encoder, batches)


STEPS = {
    "VICRegLoss": vicreg,
    "VICRegLoss of many views": many_views,
    "Projector": projector,
    "VCRegLoss": vcreg,
    "BarlowTwinsLoss": barlow,
    "SIGRegLoss": sigreg,
    "LeJEPALoss": lejepa,
    "VICRegLLoss": vicregl,
    "MaskedAttention": attention,
    "PredictionLoss": prediction,
    "AdaLN": adaln,
    "EMA": ema,
    "accumulate": accumulated,
}
