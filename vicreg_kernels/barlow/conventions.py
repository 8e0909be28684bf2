"""What the published implementations differ in: five numbers each.

Every source computes, from two views standardised over the batch,

    C = z1^T z2 / N,    scale * (sum_i (C_ii - 1)^2 + lambd * sum_{i != j} C_ij^2)

and differs in the weight, in the standard deviation (biased or not, where eps is added) and in a
factor on the whole. C is divided by N everywhere, also where the standard deviation is unbiased:
there C_ii is at most (N - 1) / N.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """One source's numbers.

    lambd: default weight of the off-diagonal sum.
    eps: added to the variance under the root, or, with eps_on_std, to the standard deviation.
    unbiased: the variance is divided by N - 1, else by N.
    scale: factor on the loss.
    """

    lambd: float = 5e-3
    eps: float = 1e-5
    eps_on_std: bool = False
    unbiased: bool = False
    scale: float = 1.0


CONVENTIONS: dict[str, Convention] = {
    # facebookresearch/barlowtwins, main.py: BatchNorm1d without affine
    "barlow_twins": Convention(lambd=0.0051),
    # lightly-ai/lightly 1.6, loss/barlow_twins_loss.py
    "lightly": Convention(),
    # vturrisi/solo-learn, losses/barlow.py
    "solo_learn": Convention(scale=0.025),
    # rbalestr-lab/stable-pretraining, losses/joint_embedding.py
    "stable_pretraining": Convention(eps_on_std=True, unbiased=True),
    # Project-MONAI/MONAI, losses/barlow_twins.py
    "monai": Convention(eps=1e-6, eps_on_std=True, unbiased=True),
}
