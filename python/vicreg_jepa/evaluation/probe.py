"""The linear probe: a linear classifier on the frozen features of an encoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vicreg_jepa.data.image_sets import Images


@dataclass(frozen=True)
class ProbeAccuracy:
    """Accuracies on the test images, in [0, 1]: fitted to all training labels, and to a few of them
    (the mean over draws).
    """

    all_labels: float
    few_labels: float


@torch.no_grad()
def calibrated(method: nn.Module, images: Tensor) -> nn.Module:
    """A copy of an untrained encoder with batch-norm statistics computed from `images`."""
    method = copy.deepcopy(method).train()
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average, not a moving one
    method.features(images.to(next(method.parameters()).device))
    return method


def accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Fit logistic regression to standardised features [N, F]; return its accuracy on the test set,
    in [0, 1].
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(train.numpy(), train_labels.numpy())
    return float(classifier.score(test.numpy(), test_labels.numpy()))


def few(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices of `per_class` random members of each class (all of a smaller one)."""
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == label][:per_class] for label in labels.unique()]
    return torch.cat(chosen)


def probe(
    train: Tensor,
    test: Tensor,
    train_set: Images,
    test_set: Images,
    *,
    seed: int,
    per_class: int = 10,
    draws: int = 10,
) -> ProbeAccuracy:
    """train, test: the features [N, F] of the two sets' images, in their order."""
    generator = torch.Generator().manual_seed(seed)
    labels, held_out = train_set.labels, test_set.labels
    whole = accuracy(train, labels, test, held_out)
    scores = []
    for _ in range(draws):
        index = few(labels, per_class, generator)
        scores.append(accuracy(train[index], labels[index], test, held_out))
    return ProbeAccuracy(whole, sum(scores) / len(scores))
