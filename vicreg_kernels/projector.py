"""The network between an encoder and a loss, with the published widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn


class Convention(NamedTuple):
    """One source's projector.

    widths: outputs of its linear layers. hidden_bias: whether those before a batch norm have a
    bias, which the norm cancels. last_bias: whether the last has one.
    """

    widths: tuple[int, ...]
    hidden_bias: bool
    last_bias: bool


CONVENTIONS: dict[str, Convention] = {
    # facebookresearch/vicreg, main_vicreg.py (and stable-pretraining, methods/vicreg.py)
    "vicreg": Convention((8192, 8192, 8192), True, False),
    # facebookresearch/barlowtwins, main.py (and stable-pretraining, methods/barlow_twins.py)
    "barlow_twins": Convention((8192, 8192, 8192), False, False),
    # lightly-ai/lightly, models/modules/heads.py: VICRegProjectionHead, BarlowTwinsProjectionHead
    "lightly": Convention((8192, 8192, 8192), False, True),
    # the same file: LeJEPAProjectionHead
    "lightly_lejepa": Convention((2048, 2048, 64), False, True),
    # vturrisi/solo-learn, methods/vicreg.py and barlow_twins.py
    "solo_learn": Convention((2048, 2048, 2048), True, True),
    # facebookresearch/eb_jepa, architectures.py, with the widths of examples/image_jepa
    "eb_jepa": Convention((2048, 2048), True, False),
}


class Projector(nn.Sequential):
    """A stack of Linear, BatchNorm1d, ReLU, ..., Linear, which VICReg calls the expander.

        projector = Projector(2048)                                   # VICReg's 8192-8192-8192
        projector = Projector(512, (2048, 2048), convention="barlow_twins")

    Args:
        features: width of the encoder's output.
        widths: outputs of the linear layers, one or more; None takes the convention's own.
        convention: "vicreg", "barlow_twins", "lightly", "lightly_lejepa", "solo_learn" or
            "eb_jepa": whose default widths to take, and which layers have a bias.

    Shapes: [N, features] -> [N, widths[-1]]. The state's names are those of a plain nn.Sequential
    ("0.weight", ...), as in the publications of VICReg, Barlow Twins and solo-learn.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        features: int,
        widths: Sequence[int] | None = None,
        *,
        convention: str = "vicreg",
    ) -> None:
        if convention not in CONVENTIONS:
            raise ValueError(f"convention: got {convention!r}, takes one of {tuple(CONVENTIONS)}")
        rule = CONVENTIONS[convention]
        widths = rule.widths if widths is None else widths
        if not isinstance(widths, (list, tuple)):
            raise TypeError(f"widths: got {type(widths).__name__}, takes a list or tuple, or None")
        if not widths:
            raise ValueError("widths: got none, takes one or more")
        for name, width in (("features", features), *(("widths", width) for width in widths)):
            if isinstance(width, bool) or not isinstance(width, int):
                raise TypeError(f"{name}: got {type(width).__name__}, takes int")
            if width < 1:
                raise ValueError(f"{name}: got {width}, takes at least 1")
        layers: list[nn.Module] = []
        for inward, outward in zip((features, *widths), widths[:-1], strict=False):
            layers.append(nn.Linear(inward, outward, bias=rule.hidden_bias))
            layers.append(nn.BatchNorm1d(outward))
            layers.append(nn.ReLU(inplace=True))
        last = widths[-2] if len(widths) > 1 else features
        layers.append(nn.Linear(last, widths[-1], bias=rule.last_bias))
        super().__init__(*layers)

    def __getitem__(self, index: Any) -> Any:
        """A layer, or the layers of a slice as a plain nn.Sequential."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)
