"""V-JEPA (Bardes et al., 2024, arXiv:2404.08471; 2: Assran et al., 2025, arXiv:2506.09985): predict
the teacher's embeddings of tubes hidden from a clip, L1 on layer-normed targets, rotary position.
"""

from __future__ import annotations

from vicreg_jepa.methods.ijepa import IJEPA


class VJEPA(IJEPA):
    """encoder, predictor: with rotary position; draw: `masks.VideoMasks`."""

    kind = "l1"
