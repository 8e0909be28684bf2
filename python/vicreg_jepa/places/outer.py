"""The outer step of DiLoCo (Douillard et al., 2023, arXiv:2311.08105, algorithm 1).

In round t every place i begins with the same weights w and takes H steps of its own to w_i. Then

    w <- SGD with Nesterov's momentum(w, g),   g = mean over places of (w - w_i)

for the trained parameters. All other tensors of floating point numbers (the teacher, the running
statistics of batch norm) become the mean of the places' own. The teacher is linear in the
encoder's history, so the mean of the teachers is the teacher of the mean encoder. Integers are
counters and each place keeps its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Shared(NamedTuple):
    """What a place that joins is sent; all on the CPU.

    anchor: float32 [trained + others], every place's weights at the last meeting, in the order of
    the state_dict, trained parameters first. velocity: float32 [trained], of the outer optimizer.
    counters: int64, the integers of the method.
    """

    anchor: Tensor
    velocity: Tensor
    counters: Tensor


class Outer:
    """The shared weights of a method and the outer optimizer.

    rate, momentum: of torch.optim.SGD with Nesterov's momentum; rate 1 with momentum 0 is the plain
    mean of weights. Raises ValueError for a method with floating point numbers but float32.
    """

    def __init__(self, method: nn.Module, rate: float, momentum: float) -> None:
        learned = {name for name, p in method.named_parameters() if p.requires_grad}
        state = method.state_dict()
        others = [name for name in state if name not in learned]
        self.method = method
        trained = [name for name in state if name in learned]
        self.floats = [*trained, *(k for k in others if state[k].is_floating_point())]
        self.integers = [name for name in others if not state[name].is_floating_point()]
        for name in self.floats:
            if state[name].dtype != torch.float32:
                raise ValueError(f"places: {name} is {state[name].dtype}, takes torch.float32")
        self.trained = sum(state[name].numel() for name in trained)
        self.anchor = self._local()
        self.weights = nn.Parameter(self.anchor[: self.trained].clone())
        self.optimizer = torch.optim.SGD(
            [self.weights], lr=rate, momentum=momentum, nesterov=momentum > 0
        )
        if momentum > 0:
            self.velocity = torch.zeros(self.trained)
            self.optimizer.state[self.weights]["momentum_buffer"] = self.velocity
        else:
            self.velocity = torch.zeros(0)

    @torch.no_grad()
    def _local(self) -> Tensor:
        state = self.method.state_dict()
        return torch.cat([torch.zeros(0), *(state[k].cpu().reshape(-1) for k in self.floats)])

    def contribution(self) -> Tensor:
        """float32 [trained + others]: w - w_i of trained parameters, the other tensors as they are.
        The mean over places is what `step` takes.
        """
        local = self._local()
        local[: self.trained] = self.anchor[: self.trained] - local[: self.trained]
        return local

    @torch.no_grad()
    def step(self, mean: Tensor) -> None:
        """Take the outer step and give the method its weights."""
        self.weights.copy_(self.anchor[: self.trained])
        self.weights.grad = mean[: self.trained].clone()
        self.optimizer.step()
        self.weights.grad = None
        self.anchor = torch.cat((self.weights.detach(), mean[self.trained :]))
        self._give()

    def shared(self) -> Shared:
        state = self.method.state_dict()
        counters = [state[name].cpu().reshape(-1).long() for name in self.integers]
        none = torch.zeros(0, dtype=torch.int64)
        return Shared(self.anchor, self.velocity, torch.cat([none, *counters]))

    @torch.no_grad()
    def adopt(self, shared: Shared) -> None:
        """Take what another place has, in place of the method's own weights and counters."""
        self.restore(shared.anchor, shared.velocity)
        self._give()
        self._write(self.integers, shared.counters)

    def restore(self, anchor: Tensor, velocity: Tensor) -> None:
        """Take the anchor and the velocity of a checkpoint; the method keeps its weights."""
        for name, own, given in (("anchor", self.anchor, anchor),
                                 ("velocity", self.velocity, velocity)):  # fmt: skip
            if own.shape != given.shape:
                raise ValueError(f"{name}: got shape {list(given.shape)}, takes {list(own.shape)}")
        self.anchor = anchor.clone()
        self.velocity.copy_(velocity)

    def _give(self) -> None:
        self._write(self.floats, self.anchor)

    def _write(self, names: list[str], flat: Tensor) -> None:
        state, begin = self.method.state_dict(), 0  # its tensors are the method's own
        for name in names:
            z = state[name]
            z.copy_(flat[begin : begin + z.numel()].view(z.shape))
            begin += z.numel()
