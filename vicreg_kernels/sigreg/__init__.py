"""SIGReg: the Epps-Pulley normality statistic on random slices, and the LeJEPA loss."""

from vicreg_kernels.sigreg.api import sigreg_directions, sigreg_loss
from vicreg_kernels.sigreg.module import LeJEPALoss, SIGRegLoss

__all__ = ["LeJEPALoss", "SIGRegLoss", "sigreg_directions", "sigreg_loss"]
