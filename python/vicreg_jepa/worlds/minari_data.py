"""Reads trajectories from Minari data sets, with the interface of the shards."""

from __future__ import annotations

from typing import Any

import numpy as np

from vicreg_jepa.worlds.episodes import Episode
from vicreg_jepa.worlds.store import Trajectories


class MinariTrajectories(Trajectories):
    """The episodes of a local data set (`minari download` downloads one).

    name: of the data set; image: the name of the image in dict observations, None if the
    observations are images. Frames must be uint8 [H, W, C], actions vectors of numbers. Raises
    ImportError if minari is missing, ValueError if the data set is missing or does not fit.
    """

    def __init__(self, name: str, image: str | None = None) -> None:
        try:
            import minari
        except ImportError as error:
            raise ImportError("data sets of Minari need minari: pip install minari") from error
        try:
            self.data = minari.load_dataset(name)
        except (FileNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"name: got {name!r}, which minari cannot load ({error})") from error
        self.name, self.image = name, image
        self.settings = {"minari": name}
        self.numbers = [int(number) for number in self.data.episode_indices]
        self.lengths = [
            int(metadata["total_steps"])
            for metadata in self.data.storage.get_episode_metadata(self.numbers)
        ]

    def episode(self, number: int) -> Episode:
        (stored,) = self.data.iterate_episodes([self.numbers[number]])
        seen: Any = stored.observations
        if self.image is not None:
            if not isinstance(seen, dict) or self.image not in seen:
                takes = sorted(seen) if isinstance(seen, dict) else "None"
                raise ValueError(f"image: got {self.image!r}, but {self.name!r} takes {takes}")
            seen = seen[self.image]
        frames, actions = np.asarray(seen), np.asarray(stored.actions)
        if frames.dtype != np.uint8 or frames.ndim != 4:
            raise ValueError(
                f"image: {self.name!r} has {frames.dtype} {list(frames.shape)}, takes uint8 "
                "[T + 1, H, W, C]"
            )
        if actions.ndim != 2 or actions.dtype.kind not in "fiu":
            raise ValueError(
                f"name: {self.name!r} has actions {actions.dtype} {list(actions.shape)}, takes "
                "numbers [T, A]"
            )
        record = {"episode": self.numbers[number], "rewards": np.asarray(stored.rewards).tolist()}
        return Episode(frames, actions.astype(np.float32), {}, record)
