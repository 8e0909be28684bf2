"""Simulated physics videos: possible ones to train on, and matched impossible ones to test with.

`possible(seed)` is a video of the mixture; `quadruplet(property, seed)` holds two possible and two
impossible videos made of the same frames. `shards` writes and reads them, `datasets` feeds them to
torch, `python -m jepa.physics` is the command line.
"""

from jepa.physics.pairs import PROPERTIES
from jepa.physics.quadruplets import Quadruplet, quadruplet
from jepa.physics.scene import FRAMES, SIZE
from jepa.physics.videos import Sample, possible

__all__ = ["FRAMES", "PROPERTIES", "SIZE", "Quadruplet", "Sample", "possible", "quadruplet"]
