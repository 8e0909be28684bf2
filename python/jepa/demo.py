"""Train VICReg on real images with the fused loss and with the plain one, and compare the two.

    python -m jepa.demo --output runs/demo

Writes vicreg_<images>.png, results.json and each encoder's weights to the output folder, and prints
one table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from jepa import figure, table
from jepa.comparison import backend_of, compare
from jepa.options import integer
from jepa.runs import Settings
from jepa.vicreg import LOSSES
from vicreg_kernels import dispatch


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m jepa.demo",
        description="Train VICReg on real images with the fused loss and with the published eager "
        "one; compare speed, parity, accuracy and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--output", type=Path, default=Path("runs/demo"), help="folder of the picture and the JSON")
    add("--steps", type=integer(1), default=200, help="training steps of each run")
    add("--batch", type=integer(2), default=256, help="images of a step")
    add("--dim", type=integer(2), default=2048, help="width of the embeddings")
    add("--hidden", type=integer(1), default=512, help="inner width of the expander")
    add("--seed", type=integer(0), default=0, help="of weights, batches, views and split")
    add("--loss", choices=(*LOSSES, "both"), default="both", help="which loss to train with")
    add("--backend", choices=dispatch.BACKENDS, help="of the fused loss; the best one by default")
    add("--device", default="cpu", help="cpu, cuda or cuda:<n>")
    add("--images", metavar="FOLDER", help="<class>/<file> images instead of the digits")
    add("--image-size", type=integer(4), default=32, help="edge that --images are resized to")
    return found


def _check(settings: Settings, names: tuple[str, ...], output: Path) -> None:
    """Raise an error that names the option before anything is trained."""
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise ValueError(f"--device: got {settings.device!r}, takes cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {settings.device!r}, takes cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: got {settings.device!r}, but torch sees {torch.cuda.device_count()} GPUs"
        )
    if settings.backend is not None and "fused" not in names:
        raise ValueError("--backend: names the fused loss's, takes --loss fused or both")
    backend_of(settings)
    images = len(settings.sets()[0])
    if settings.batch > images:
        raise ValueError(f"--batch: got {settings.batch}, takes at most {images} (training images)")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: got {str(output)!r}, a file; takes a folder")


def main(arguments: list[str] | None = None) -> None:
    options = parser()
    chosen = vars(options.parse_args(arguments))
    output: Path = chosen.pop("output")
    loss = chosen.pop("loss")
    names = LOSSES if loss == "both" else (loss,)
    settings = Settings(**chosen)
    try:
        _check(settings, names, output)
    except (ImportError, RuntimeError, ValueError) as error:
        options.error(str(error))
    output.mkdir(parents=True, exist_ok=True)
    results = compare(settings, names, output)
    picture = output / f"vicreg_{results['data']['name']}.png"
    figure.draw(results, picture)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table.render(results))
    print(f"{picture} and {output / 'results.json'} written, in {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
