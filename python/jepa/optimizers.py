"""AdamW from torch, LARS from timm; biases, norms and single vectors are not decayed."""

from __future__ import annotations

import torch
from torch import nn

from jepa.config import Optimizer


def groups(module: nn.Module, weight_decay: float) -> list[dict]:
    decayed = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build(settings: Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    found = groups(module, settings.weight_decay)
    if settings.name == "adamw":
        return torch.optim.AdamW(found, lr=settings.rate, betas=settings.betas)
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise ImportError("optimizer.name: 'lars' is timm's: pip install timm") from error
    return Lars(found, lr=settings.rate, momentum=0.9, trust_coeff=0.001)
