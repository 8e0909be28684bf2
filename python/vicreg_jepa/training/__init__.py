"""A run: the loop (trainer.py), starting, resuming and reading it (run.py), checkpoints, log,
stop.
"""
