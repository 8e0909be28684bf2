"""Planning at two levels or more: a level above proposes latents, the level below reaches them.

energies.py makes energies of the counted steps between landmarks (models/landmarks.py), planner.py
plans on all levels, levels.py has macro-actions that need no training, trained.py the planner of a
trained run.
"""
