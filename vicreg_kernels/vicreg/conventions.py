"""How each published implementation scales the same three quantities.

Every source computes, per view, the same raw quantities

    invariance  mean((x - y)^2)
    variance    mean_d relu(margin - sqrt(var_d + eps))
    covariance  sum_{i != j} C_ij^2,   C = Zc^T Zc / (N - 1)

and differs only in how views are combined (sum or mean), in the covariance normaliser and in the
default weights. So a convention is six numbers and a rule for inputs of more than two dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """One source's scaling of the raw terms.

    weights: default (invariance, variance, covariance) weights.
    variance_view: factor on each view's hinge before views are added.
    covariance_view: factor on each view's covariance sum before views are added.
    normalizer: "d" divides the covariance sum by D, "d(d-1)" by D (D - 1).
    positions: inputs may be [B, ..., D], with batch statistics per position and the mean over
        positions.
    """

    weights: tuple[float, float, float]
    variance_view: float
    covariance_view: float
    normalizer: str = "d"
    positions: bool = False


CONVENTIONS: dict[str, Convention] = {
    # facebookresearch/vicreg, main_vicreg.py
    "vicreg": Convention((25.0, 25.0, 1.0), 0.5, 1.0),
    # facebookresearch/VICRegL: covariance averaged over views; its local terms are per location
    "vicregl": Convention((25.0, 25.0, 1.0), 0.5, 0.5, positions=True),
    # facebookresearch/eb_jepa, losses.py; weights of its ResNet recipe
    "eb_jepa": Convention((1.0, 1.0, 80.0), 1.0, 1.0, normalizer="d(d-1)"),
    # vturrisi/solo-learn, losses/vicreg.py
    "solo_learn": Convention((25.0, 25.0, 1.0), 1.0, 1.0),
    # rbalestr-lab/stable-pretraining, losses
    "stable_pretraining": Convention((25.0, 25.0, 1.0), 0.5, 1.0),
    # lightly-ai/lightly, loss/vicreg_loss.py
    "lightly": Convention((25.0, 25.0, 1.0), 0.5, 1.0, positions=True),
    # KevinMusgrave/pytorch-metric-learning 2.9, losses/vicreg_loss.py
    "pytorch_metric_learning": Convention((25.0, 25.0, 1.0), 0.5, 1.0),
}


def covariance_scale(dim: int, normalizer: str) -> float:
    """The factor that `normalizer` puts on the sum of squared off-diagonal covariances."""
    return 1.0 / dim if normalizer == "d" else 1.0 / (dim * (dim - 1))
