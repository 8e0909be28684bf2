"""Planning at two levels or more: a level above proposes latents, the level below reaches them.

landmarks.py counts the steps between latents that walks have visited, energies.py makes energies of
them, planner.py plans on all levels, levels.py reads the levels of a trained run. report.py and
figure.py have the table and the picture of `vicreg-jepa plan`.
"""
