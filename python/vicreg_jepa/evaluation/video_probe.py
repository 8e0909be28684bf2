"""The video probes: an attentive and a linear classifier on the frozen tokens of an encoder.

The report also gives both for an untrained encoder and for shuffled labels, as baselines. The
attentive probe is that of V-JEPA (Bardes et al., 2024, arXiv:2404.08471, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import vicreg_kernels as vk
from vicreg_jepa.data import image_sets
from vicreg_jepa.evaluation import probe

EPOCHS, BATCH, RATE, DECAY = 30, 32, 3e-3, 0.01


class AttentiveProbe(nn.Module):
    """Tokens [B, T, dim] -> logits [B, classes]: a learned query attends to all tokens; the result
    is added to the query, and an MLP with GELU, a norm and a linear layer follow.

    backend: of masked_attention. Raises ValueError if dim is not a multiple of heads.
    """

    def __init__(self, dim: int, heads: int, classes: int, backend: str | None = None) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: got {heads}, takes a divisor of {dim}")
        self.heads, self.backend = heads, backend
        self.query = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm1, self.kv = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim)
        self.q, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm2, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(len(tokens), 1, -1)
        k, v = self.kv(self.norm1(tokens)).chunk(2, dim=-1)
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (self.q(query), k, v))
        pooled = vk.masked_attention(q, k, v, backend=self.backend)
        h = query + self.proj(pooled.transpose(1, 2).flatten(2))
        return self.head(self.norm2(self.mlp(h)))[:, 0]


def attentive(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    heads: int,
    seed: int,
    backend: str | None = None,
) -> float:
    """The accuracy on the test set of an AttentiveProbe that is fitted to the training set.

    Tokens float [N, T, D], labels int64 [N]; AdamW, a cosine over 30 epochs, batches of 32.
    """
    torch.manual_seed(seed)
    classes = int(torch.cat((train_labels, test_labels)).max()) + 1
    classifier = AttentiveProbe(train.shape[-1], heads, classes, backend).to(train.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH):
            loss = nn.functional.cross_entropy(classifier(train[rows]), train_labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        guesses = torch.cat([classifier(part).argmax(dim=1) for part in test.split(BATCH)])
    return float((guesses == test_labels).float().mean())


@dataclass(frozen=True)
class Labelled:
    """Videos by number, in the form that data.split takes."""

    rows: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def subset(self, index: Tensor) -> Labelled:
        return replace(self, rows=self.rows[index], labels=self.labels[index])


def labelled(names: Sequence[str]) -> Labelled:
    """Raises ValueError for fewer than two classes."""
    classes = sorted(set(names))
    if len(classes) < 2:
        raise ValueError(f"label: all videos have {classes}, takes at least two classes")
    number = {name: n for n, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name in names])
    return Labelled(torch.arange(len(names)), labels, tuple(classes))


@dataclass(frozen=True)
class Scores:
    """Shares of the test videos, in [0, 1]."""

    attentive: float
    linear: float


def scores(
    tokens: Tensor, videos: Labelled, *, heads: int, seed: int, backend: str | None = None
) -> Scores:
    """Fit both probes to tokens [N, T, D], in the order of the videos.

    The seed decides which fifth of each class is held out.
    """
    train, test = image_sets.split(videos, seed)  # type: ignore[type-var]
    seen, held_out = tokens[train.rows], tokens[test.rows]
    settings: dict[str, Any] = {"heads": heads, "seed": seed, "backend": backend}
    return Scores(
        attentive(seen, train.labels, held_out, test.labels, **settings),
        probe.accuracy(seen.mean(dim=1), train.labels, held_out.mean(dim=1), test.labels),
    )


def shuffled(videos: Labelled, seed: int) -> Labelled:
    """The same videos with shuffled labels, a baseline that shows what a probe reaches by
    chance.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(videos.labels), generator=generator)
    return replace(videos, labels=videos.labels[order])
