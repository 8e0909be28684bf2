"""SIGReg: the Epps-Pulley normality statistic on random slices, and the LeJEPA loss."""

from vicreg_kernels.sigreg.module import LeJEPALoss, SIGRegLoss
from vicreg_kernels.sigreg.op import sigreg_directions, sigreg_loss

__all__ = ["LeJEPALoss", "SIGRegLoss", "sigreg_directions", "sigreg_loss"]
