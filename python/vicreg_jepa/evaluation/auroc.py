"""How well one threshold tells two kinds of samples apart."""

from __future__ import annotations

from collections.abc import Sequence


def auroc(possible: Sequence[float], impossible: Sequence[float]) -> float:
    """The area under the ROC curve of a threshold on the surprise, in [0, 1]: the probability that
    an impossible sample has a higher one than a possible sample, a tie being half.
    """
    from sklearn.metrics import roc_auc_score

    labels = [0] * len(possible) + [1] * len(impossible)
    return float(roc_auc_score(labels, [*possible, *impossible]))
