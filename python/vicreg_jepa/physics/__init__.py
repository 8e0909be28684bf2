"""Simulated physics videos: possible videos for training, and matched impossible ones for tests.

`possible(seed)` returns a training video; `quadruplet(property, seed)` returns two possible and two
impossible videos made of the same frames. `shards` writes and reads them, `datasets` has the public
Dataset classes for torch, and `python -m vicreg_jepa.physics` is the command line.
"""

from vicreg_jepa.physics.properties import PROPERTIES
from vicreg_jepa.physics.quadruplets import Quadruplet, quadruplet
from vicreg_jepa.physics.scene import FRAMES, SIZE
from vicreg_jepa.physics.videos import Sample, possible

__all__ = ["FRAMES", "PROPERTIES", "SIZE", "Quadruplet", "Sample", "possible", "quadruplet"]
