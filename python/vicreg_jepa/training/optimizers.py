"""AdamW from torch, and LARS; biases, norms and single vectors have no weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.config import Optimizer


def groups(module: nn.Module, weight_decay: float) -> list[dict]:
    decayed = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build(settings: Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    parameters = groups(module, settings.weight_decay)
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.rate, betas=settings.betas)
    return LARS(parameters, settings.rate, trust=settings.trust, cap_trust=settings.cap_trust)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You, Gitman and Ginsburg, 2017, arXiv:1708.03888, algorithm 1).

        v <- momentum v + r (g + decay w);  w <- w - lr v,   r = trust |w| / (|g| + decay |w|)

    for each tensor w with gradient g. As VICReg and Barlow Twins train, a group without decay keeps
    r = 1, and so does a tensor while w or g is zero. cap_trust: r is min(r / lr, 1) instead, as
    solo-learn trains them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        cap_trust: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"trust": trust, "cap_trust": cap_trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._step(w, group)
        return loss

    def _step(self, w: Tensor, group: dict[str, Any]) -> None:
        update, decay = w.grad, group["weight_decay"]
        if decay:
            size, slope = w.norm(), w.grad.norm()
            ratio = group["trust"] * size / (slope + decay * size)
            if group["cap_trust"]:
                ratio = (ratio / group["lr"]).clamp(max=1.0)
            ratio = torch.where((size > 0) & (slope > 0), ratio, 1.0)
            update = (w.grad + decay * w) * ratio
        state = self.state[w]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(w)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        w.sub_(velocity, alpha=group["lr"])
