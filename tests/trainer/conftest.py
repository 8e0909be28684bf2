"""Leaves the trainer's tests out where the packages that the trainer needs are missing."""

from __future__ import annotations

import os
from importlib.util import find_spec

# `make test` installs them; a machine with a GPU may not have them.
TRAINER = ("matplotlib", "pydantic", "pymunk", "rich", "safetensors", "sklearn", "tqdm", "yaml")
collect_ignore_glob = []
if not os.environ.get("CI") and not all(map(find_spec, TRAINER)):
    collect_ignore_glob += ["test_*.py"]
if not os.environ.get("CI") and find_spec("gymnasium") is None:  # the extra `worlds`
    collect_ignore_glob += ["test_world_environments.py"]
if not os.environ.get("CI") and find_spec("kornia") is None:  # the extra `augment`
    collect_ignore_glob += ["test_natural.py"]
