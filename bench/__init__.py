"""Benchmarks: this library's ops against the published formulas and the best plain PyTorch."""

from pathlib import Path

# In the order in which a GPU's time is spent; a new op adds its name and bench/<op>.py.
OPS = tuple(
    op
    for op in ("sigreg", "barlow", "vicregl", "attention", "ema", "tokens", "jepa_step", "vicreg")
    if Path(__file__).with_name(f"{op}.py").exists()
)
# Those, what the calls of all of them cost the host, and what only a CPU is measured on.
ALL = (*OPS, "host", "ranks")
