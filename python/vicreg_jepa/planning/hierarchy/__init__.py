"""Planning at two levels or more: a level above proposes latents, the level below reaches them.

landmarks.py counts the steps between latents that walks have visited, energies.py makes energies of
them, planner.py plans on all levels, levels.py has macro-actions that need no training, trained.py
the planner of a trained run.
"""
