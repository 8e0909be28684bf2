"""What the information filter compares: the arms and the strengths of the noise."""

from __future__ import annotations

from vicreg_jepa.physics import PROPERTIES

# arm -> its recipe and settings
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "teacher": ("vjepa_causal_physics", ()),
    "vicreg": ("jepa_causal_physics", ()),
    "sigreg": ("jepa_causal_physics", ("loss.vc_weight=0", "loss.sigreg=0.05")),
    "pixels": ("pixels_physics", ()),
    "blur": ("pixels_physics", ("model.blur=1.5",)),
}
STRENGTHS = (0.0, 0.25, 0.5, 1.0)
BROKEN = tuple(name for name in PROPERTIES if name != "control")
NOISES = ("light", "shake", "texture", "camera", "leaves")
