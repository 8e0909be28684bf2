"""A run: the loop (trainer.py), its start and return (run.py), its checkpoints, log and end."""
