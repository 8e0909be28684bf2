"""A thin trainer for joint-embedding models, on the public API of vicreg_kernels.

config/ has the settings of a run, methods/ the training methods, training/ the loop. evaluation/
and surprise/ measure what was learned, compare/ times it, and demo/ shows all of it. They use
data/, distributed/, ops/, models/ and files/; physics/ simulates videos,
worlds/ simulates environments that take actions, planning/ plans in them, and memory/ keeps what
was seen there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vicreg_jepa.training.encoder import Encoder


def load_encoder(file: str | Path) -> Encoder:
    """Load an encoder that `vicreg-jepa export` wrote; see training/encoder.py."""
    from vicreg_jepa.training import encoder

    return encoder.load_encoder(file)
