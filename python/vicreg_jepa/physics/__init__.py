"""Simulated physics videos: possible ones to train on, and matched impossible ones to test with.

`possible(seed)` is a video of the mixture; `quadruplet(property, seed)` holds two possible and two
impossible videos made of the same frames. `shards` writes and reads them, `datasets` has
the public classes that feed them to torch, `python -m vicreg_jepa.physics` is the command line.
"""

from vicreg_jepa.physics.properties import PROPERTIES
from vicreg_jepa.physics.quadruplets import Quadruplet, quadruplet
from vicreg_jepa.physics.scene import FRAMES, SIZE
from vicreg_jepa.physics.videos import Sample, possible

__all__ = ["FRAMES", "PROPERTIES", "SIZE", "Quadruplet", "Sample", "possible", "quadruplet"]
