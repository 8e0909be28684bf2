"""Barlow Twins: redundancy reduction between two views."""

from vicreg_kernels.barlow.api import barlow_twins_loss
from vicreg_kernels.barlow.module import BarlowTwinsLoss

__all__ = ["BarlowTwinsLoss", "barlow_twins_loss"]
