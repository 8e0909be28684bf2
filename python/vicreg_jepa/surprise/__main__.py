"""Calibrates the surprise of the package's model anew, as `make pretrained` does after training it.

python -m vicreg_jepa.surprise
"""

from __future__ import annotations

from vicreg_jepa import pretrained
from vicreg_jepa.surprise import calibration
from vicreg_jepa.training.run import restore


def main() -> None:
    file = pretrained.path("surprise")
    settings, method, _ = restore(file)
    kept = calibration.beside(file)
    calibration.calibrated(method, settings, kept)
    print(f"{kept} written")


if __name__ == "__main__":
    main()
