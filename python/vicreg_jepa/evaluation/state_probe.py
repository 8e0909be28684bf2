"""Probes of the true state on frozen features of frames: ridge regression and a small MLP.

A fact of floats, such as a position, is regressed; one of integers, such as the room, is classified
by regression on one-hot vectors. Both probes are fitted to all facts at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vicreg_jepa.models.fitting import fit
from vicreg_jepa.models.perceptron import mlp

Facts = Mapping[str, Tensor]

PENALTIES = [10.0**k for k in range(-7, 2)]  # in the mean square of a sample's features
VALIDATION = 0.2  # the share of the samples that chooses the penalty
HIDDEN, STEPS, BATCH, RATE, DECAY = 128, 800, 128, 2e-3, 0.01


def varying(fit: Facts, test: Facts) -> list[str]:
    """The names of the facts that are not the same in all samples."""
    return [name for name in fit if len(torch.cat((fit[name], test[name])).unique(dim=0)) > 1]


def columns(fact: Tensor, classes: int) -> Tensor:
    """float64 [N, K] of a fact [N, ...]: its values, or their one-hot vectors of `classes`."""
    values = fact.reshape(len(fact), -1)
    if fact.is_floating_point():
        return values.double()
    return nn.functional.one_hot(values.long(), classes).double().flatten(1)


def classes_of(fit: Tensor, test: Tensor) -> int:
    return int(torch.cat((fit, test)).max()) + 1


def error(fact: Tensor, predicted: Tensor) -> float:
    """The error of predictions: for floats the root mean square distance, in the fact's unit; for
    integers the share of values that are wrong. predicted: columns [N, K].
    """
    if fact.is_floating_point():
        return float((columns(fact, 0) - predicted).square().sum(dim=1).mean().sqrt())
    values = fact.reshape(len(fact), -1)
    guesses = predicted.unflatten(1, (values.shape[1], -1)).argmax(dim=2)
    return float((guesses != values).double().mean())


def constant(fit: Tensor, test: Tensor) -> float:
    """The error of a constant prediction: the mean, or the most common class, of `fit`."""
    mean = columns(fit, classes_of(fit, test)).mean(dim=0)
    return error(test, mean.expand(len(test), -1))


def errors(
    features: Tensor, held_out: Tensor, fit: Facts, test: Facts, seed: int
) -> dict[str, tuple[float, float]]:
    """Fit both probes and return their errors on the test samples, for each fact: (that of ridge
    regression, that of the MLP).

    features: [N, F], of the samples to fit to; held_out: [M, F], of the test samples.
    """
    numbers = {name: classes_of(fit[name], test[name]) for name in fit}
    targets = torch.cat([columns(fact, numbers[name]) for name, fact in fit.items()], dim=1)
    mean, scale = targets.mean(dim=0), targets.std(dim=0).clamp_min(1e-12)
    goal = (targets - mean) / scale
    # One scale for all: a pixel that hardly varies here may vary much in the test samples.
    middle = features.mean(dim=0)
    spread = (features - middle).square().mean().sqrt().clamp_min(1e-12)
    x, z = (features - middle) / spread, (held_out - middle) / spread
    both = [guess * scale + mean for guess in (ridge(x, goal, z), perceptron(x, goal, z, seed))]
    by_fact, at = {}, 0
    for name, fact in test.items():
        width = columns(fact, numbers[name]).shape[1]
        linear, deep = (error(fact, guess[:, at : at + width]) for guess in both)
        by_fact[name], at = (linear, deep), at + width
    return by_fact


def ridge(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Fit ridge regression to x [N, F] and y [N, K] of mean 0, and predict [M, K] for z [M, F]. The
    last samples choose the penalty of each column. Where F is more than N, the dual problem is
    solved, so that no more than the smaller of both is squared.
    """
    count, cut = len(x), len(x) - max(1, round(VALIDATION * len(x)))
    dual = x.shape[1] > count
    # Samples as rows of what the weights multiply: their products with x, or their features.
    seen = ((torch.cat((x, z)) @ x.T) if dual else torch.cat((x, z))).double()
    unit = seen[:count].diagonal().mean() if dual else seen[:count].square().sum(dim=1).mean()

    def solved(rows: int, penalty: float, test: Tensor, goal: Tensor) -> Tensor:
        fit, wanted = seen[:rows], goal[:rows]
        if dual:
            fit, test = fit[:, :rows], test[:, :rows]
        else:
            fit, wanted = fit.T @ fit, fit.T @ wanted
        eye = torch.eye(len(fit), dtype=fit.dtype)
        return test @ torch.linalg.solve(fit + penalty * unit * eye, wanted)

    guesses = torch.stack([solved(cut, p, seen[cut:count], y) for p in PENALTIES])
    best = (guesses - y[cut:]).square().mean(dim=1).argmin(dim=0)  # [K]
    out = y.new_zeros(len(z), y.shape[1])
    for number in best.unique().tolist():
        chosen = best == number
        out[:, chosen] = solved(count, PENALTIES[number], seen[count:], y[:, chosen])
    return out


def perceptron(
    x: Tensor, y: Tensor, z: Tensor, seed: int, steps: int | None = None, batch: int = BATCH
) -> Tensor:
    """Predict as `ridge` does, by an MLP of two hidden layers, trained by AdamW with a cosine
    schedule.
    """
    steps = STEPS if steps is None else steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = mlp(x.shape[1], HIDDEN, HIDDEN, y.shape[1])
        goal = y.float()

        def loss(rows: Tensor) -> Tensor:
            return nn.functional.mse_loss(network(x[rows]), goal[rows])

        fit(network, loss, len(x), steps=steps, batch=batch, rate=RATE, decay=DECAY)
    with torch.no_grad():
        return network(z).double()
