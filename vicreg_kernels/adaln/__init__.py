"""Adaptive layer norm: a layer norm modulated by a condition, and the gate of a residual branch."""

from vicreg_kernels.adaln.api import gated_residual, modulated_layer_norm
from vicreg_kernels.adaln.module import AdaLN

__all__ = ["AdaLN", "gated_residual", "modulated_layer_norm"]
