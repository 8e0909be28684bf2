"""The teacher as an exponential moving average of the student."""

from vicreg_kernels.ema.api import ema_update_
from vicreg_kernels.ema.module import EMA

__all__ = ["EMA", "ema_update_"]
