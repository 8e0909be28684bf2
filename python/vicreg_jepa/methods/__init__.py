"""The methods, one file each, on the public API of vicreg_kernels; base.py defines what a method
is.

Importing a method's file registers it in METHODS.
"""

from vicreg_jepa.methods import (
    hierarchy,
    ijepa,
    jepa_causal,
    lejepa,
    pixels,
    vicreg,
    vicreg_jepa,
    vjepa,
    vjepa_causal,
    world,
    world_pixels,
)
from vicreg_jepa.methods.base import METHODS, MethodKind, register

__all__ = [
    "METHODS",
    "MethodKind",
    "hierarchy",
    "ijepa",
    "jepa_causal",
    "lejepa",
    "pixels",
    "register",
    "vicreg",
    "vicreg_jepa",
    "vjepa",
    "vjepa_causal",
    "world",
    "world_pixels",
]
