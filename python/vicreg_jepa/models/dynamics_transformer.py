"""A causal transformer as predictor of a world model.

A frame's latent is one token, or is cut into several. Its action conditions the blocks by adaptive
layer norm. A frame attends to itself and to the `history - 1` frames before it, with rotary
positions in time, which are relative; so a rollout of any length looks like the windows of the
training, and a memory of history - 1 frames of keys and values is enough for it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

import vicreg_kernels as vk
from vicreg_jepa.models.dynamics import Dynamics, still
from vicreg_jepa.models.vit import Mlp


class TransformerOps(Protocol):
    """The ops that the blocks use, fused or reference (`ops/`)."""

    def modulated_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor: ...

    def gated_residual(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor: ...

    def attend_history(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: int, history: int
    ) -> Tensor: ...


class Past(NamedTuple):
    """A block's keys and values of earlier frames: [N, heads, frames x tokens, d] each."""

    keys: Tensor
    values: Tensor


class ConditionedBlock(nn.Module):
    """A transformer block on frames of tokens [N, T, tokens, dim], conditioned by a vector a frame
    as in DiT (adaLN-Zero: Peebles and Xie, 2023, arXiv:2212.09748): it begins as the identity.
    """

    def __init__(
        self, dim: int, heads: int, condition: int, history: int, ops: TransformerOps
    ) -> None:
        super().__init__()
        self.history, self.ops = history, ops
        self.condition = nn.Linear(condition, 6 * dim)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        self.attn = vk.MaskedAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, condition: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """condition: [N, T, E]. past: of the frames before x; if there is one, x is one frame."""
        vectors = self.condition(nn.functional.silu(condition)).chunk(6, dim=-1)  # [N, T, dim]
        normed = self.ops.modulated_layer_norm(x, vectors[0], vectors[1])
        attended, past = self._attend(normed, past)
        x = self.ops.gated_residual(x, attended, vectors[2])
        normed = self.ops.modulated_layer_norm(x, vectors[3], vectors[4])
        return self.ops.gated_residual(x, self.mlp(normed), vectors[5]), past

    def _attend(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        tokens, heads = x.shape[2], self.attn.num_heads
        three = self.attn.qkv(x.flatten(1, 2)).unflatten(-1, (3, heads, -1))
        q, k, v = three.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, T x tokens, d]
        if past is not None:
            k, v = torch.cat((past.keys, k), dim=2), torch.cat((past.values, v), dim=2)
        out = self.ops.attend_history(q, k, v, tokens, self.history)
        kept = max(0, k.shape[2] - (self.history - 1) * tokens)
        past = Past(k[:, :, kept:], v[:, :, kept:])
        return self.attn.proj(out.transpose(1, 2).flatten(2)).view_as(x), past


class TransformerDynamics(Dynamics):
    """dim: the width of its tokens; tokens: those of a frame, a divisor of `latent`; history: the
    number of frames that a frame sees, itself included.
    """

    def __init__(
        self,
        latent: int,
        condition: int,
        dim: int,
        depth: int,
        heads: int,
        ops: TransformerOps,
        *,
        tokens: int = 1,
        history: int = 4,
    ) -> None:
        super().__init__()
        if latent % tokens:
            raise ValueError(f"tokens: got {tokens}, takes a divisor of the latent's {latent}")
        self.tokens = tokens
        self.embed = nn.Linear(latent // tokens, dim)
        self.place = nn.Parameter(torch.empty(tokens, dim))  # tells a frame's tokens apart
        nn.init.trunc_normal_(self.place, std=0.02)
        self.blocks = nn.ModuleList(
            ConditionedBlock(dim, heads, condition, history, ops) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.change = nn.Linear(dim, latent // tokens)
        still(self.change)

    def one_step(self, latents: Tensor, actions: Tensor) -> Tensor:
        return self._run(latents, actions, None)[0]

    def remember(self, latents: Tensor, actions: Tensor) -> list[Past] | None:
        return self._run(latents, actions, None)[1] if latents.shape[1] else None

    def step(
        self, latent: Tensor, action: Tensor, memory: list[Past] | None
    ) -> tuple[Tensor, list[Past]]:
        after, memory = self._run(latent[:, None], action[:, None], memory)
        return after[:, 0], memory

    def _run(
        self, latents: Tensor, actions: Tensor, memory: list[Past] | None
    ) -> tuple[Tensor, list[Past]]:
        x = self.embed(latents.unflatten(-1, (self.tokens, -1))) + self.place
        kept = []
        for number, block in enumerate(self.blocks):
            x, past = block(x, actions, None if memory is None else memory[number])
            kept.append(past)
        return latents + self.change(self.norm(x)).flatten(2), kept
