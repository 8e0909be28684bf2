"""Makes the worlds known to gymnasium, which calls `register` itself where this package is
installed (the entry point `gymnasium.envs`). Nothing of torch is loaded here.
"""

from __future__ import annotations

STEPS = 200  # of an episode
WORLDS = ("TwoRooms", "Maze")


def register() -> None:
    """`vicreg_jepa/TwoRooms-v0` and `vicreg_jepa/Maze-v0`, alone and as vectors."""
    import gymnasium

    for world in WORLDS:
        name = f"vicreg_jepa/{world}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(
                id=name,
                entry_point="vicreg_jepa.worlds.environments:WorldEnv",
                vector_entry_point="vicreg_jepa.worlds.environments:WorldVectorEnv",
                max_episode_steps=STEPS,
                kwargs={"world": world},
            )
