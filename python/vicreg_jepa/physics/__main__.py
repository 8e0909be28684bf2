"""Write physics videos as shards.

python -m vicreg_jepa.physics --output FOLDER --videos 100000 --workers 2 --seed 0
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from vicreg_jepa.cli_options import integer
from vicreg_jepa.physics import shards
from vicreg_jepa.physics.properties import PROPERTIES

OPTIONS = {"per_shard": "--videos-per-shard", "version": "--output"}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m vicreg_jepa.physics",
        description="Simulate physics videos (uint8, 32 x 64 x 64 x 3) and write them as tar "
        "shards; what is there already is kept, so a stopped run is resumed by the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--output", type=Path, required=True, help="folder of the shards")
    add("--videos", type=integer(1), default=10000, help="how many, those there included")
    add("--workers", type=integer(0, 1024), default=2, help="processes; 0: this one alone")
    add("--seed", type=integer(0), default=0, help="with its number decides each video")
    add("--videos-per-shard", type=integer(1), default=256, help="of all shards but the last")
    add("--property", choices=tuple(PROPERTIES), help="write quadruplets of this instead")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parser()
    chosen = options.parse_args(arguments)
    settings = shards.Settings(chosen.seed, chosen.videos_per_shard, chosen.property)
    unit = "video" if chosen.property is None else "quadruplet"
    try:
        with tqdm(total=chosen.videos, desc="simulating", unit=unit, ncols=100) as bar:
            written = shards.write(
                chosen.output, chosen.videos, settings, chosen.workers, bar.update
            )
    except KeyboardInterrupt:
        print(f"stopped; the same command resumes in {chosen.output}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (OSError, ValueError) as error:
        name, _, rest = str(error).partition(":")
        options.error(
            f"{OPTIONS.get(name, '--' + name)}:{rest}" if name.isidentifier() else str(error)
        )
    size = sum(path.stat().st_size for path in written)
    print(
        f"{chosen.videos} {unit}s in {len(written)} shards of {chosen.output}, "
        f"{size / chosen.videos / 1024:.1f} KiB each"
    )


if __name__ == "__main__":
    main()
