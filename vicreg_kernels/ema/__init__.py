"""The teacher as an exponential moving average of the student."""

from vicreg_kernels.ema.module import EMA
from vicreg_kernels.ema.op import ema_update_

__all__ = ["EMA", "ema_update_"]
