"""Predictors of a world model: the next latent from latents and actions.

Each predicts the change from a frame's latent to the next one's and begins near "nothing changes".
Latents are [N, T, D]; actions are embedded, [N, T, E], and the action at a frame leads to the next
frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.models.perceptron import mlp

FREQUENCY = 5.0
STILL = 0.1  # the factor on the initial weights of the layer that writes the change


class Dynamics(nn.Module, ABC):
    """The interface of a predictor. A memory holds what it keeps of earlier frames."""

    @abstractmethod
    def one_step(self, latents: Tensor, actions: Tensor) -> Tensor:
        """[N, T, D]: the prediction of each frame's next latent from this frame and those before
        it. latents [N, T, D], actions [N, T, E].
        """

    @abstractmethod
    def remember(self, latents: Tensor, actions: Tensor) -> Any:
        """The memory after frames [N, T, D] that were followed by actions [N, T, E]; T may be 0."""

    @abstractmethod
    def step(self, latent: Tensor, action: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """([N, D], memory): the latent after `latent` [N, D] and `action` [N, E]."""

    def unroll(self, start: Tensor, actions: Tensor) -> Tensor:
        """[N, H, D]: predictions after the observed latents `start` [N, S, D], each from the one
        before it, with one step of the predictor each.

        actions: [N, S - 1 + H, E], those between the observed frames first. Raises ValueError
        without an observed frame or a step to predict.
        """
        seen, steps = start.shape[1], actions.shape[1] - start.shape[1] + 1
        if seen < 1 or steps < 1:
            raise ValueError(
                f"actions: got {actions.shape[1]} for {seen} observed frames, takes at least one "
                "frame and as many actions as frames"
            )
        memory = self.remember(start[:, :-1], actions[:, : seen - 1])
        latent, predicted = start[:, -1], []
        for number in range(seen - 1, actions.shape[1]):
            latent, memory = self.step(latent, actions[:, number], memory)
            predicted.append(latent)
        return torch.stack(predicted, dim=1)


class MLPDynamics(Dynamics):
    """z' = z + f(z, a), with `depth` hidden layers of width `hidden`: it sees one frame alone.

    waves: a number of random directions; f also sees the sine and the cosine of the latent along
    each (Tancik et al., 2020, arXiv:2006.10739). A perceptron learns functions of high frequency
    last, and a wall is one: of few pixels in a large world. frequency: the deviation of the
    directions' elements, in radians per unit of a latent.
    """

    directions: Tensor | None

    def __init__(
        self,
        latent: int,
        condition: int,
        hidden: int,
        depth: int,
        waves: int = 0,
        frequency: float = FREQUENCY,
    ) -> None:
        super().__init__()
        directions = frequency * torch.randn(latent, waves) if waves else None
        self.register_buffer("directions", directions)
        self.change = mlp(latent + 2 * waves + condition, *(hidden,) * depth, latent)
        still(self.change[-1])

    def one_step(self, latents: Tensor, actions: Tensor) -> Tensor:
        seen: tuple[Tensor, ...] = (latents, actions)
        if self.directions is not None:
            angles = latents @ self.directions
            seen = (*seen, angles.sin(), angles.cos())
        return latents + self.change(torch.cat(seen, dim=-1))

    def remember(self, latents: Tensor, actions: Tensor) -> None:
        return None

    def step(self, latent: Tensor, action: Tensor, memory: None) -> tuple[Tensor, None]:
        return self.one_step(latent, action), None


class GRUDynamics(Dynamics):
    """`depth` layers of gated recurrent units of width `hidden` over (latent, action)."""

    def __init__(self, latent: int, condition: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.gru = nn.GRU(latent + condition, hidden, depth, batch_first=True)
        self.change = nn.Linear(hidden, latent)
        still(self.change)

    def one_step(self, latents: Tensor, actions: Tensor) -> Tensor:
        return self._run(latents, actions, None)[0]

    def remember(self, latents: Tensor, actions: Tensor) -> Tensor | None:
        return self._run(latents, actions, None)[1] if latents.shape[1] else None

    def step(
        self, latent: Tensor, action: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        after, memory = self._run(latent[:, None], action[:, None], memory)
        return after[:, 0], memory

    def _run(
        self, latents: Tensor, actions: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden, memory = self.gru(torch.cat((latents, actions), dim=-1), memory)
        return latents + self.change(hidden), memory


def still(layer: nn.Module) -> None:
    """Scale down the layer that outputs the change, so that a prediction begins near its input."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(STILL)
