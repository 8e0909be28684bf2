"""Small trained models that come with the package; `make pretrained` trains and writes them."""

from __future__ import annotations

from pathlib import Path

# Command -> the file of its model, as `vicreg-jepa export --format whole` writes it.
FILES = {
    "surprise": "vjepa_causal_physics.safetensors",
    "plan": "world_two_rooms.safetensors",
    "recall": "world_maze_window.safetensors",
    "act": "world_maze_window.safetensors",
}


def path(command: str) -> Path:
    """The file of the model that a command takes with --pretrained."""
    return Path(__file__).parent / FILES[command]
