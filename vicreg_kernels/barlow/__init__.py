"""Barlow Twins: redundancy reduction between two views."""

from vicreg_kernels.barlow.module import BarlowTwinsLoss
from vicreg_kernels.barlow.op import barlow_twins_loss

__all__ = ["BarlowTwinsLoss", "barlow_twins_loss"]
