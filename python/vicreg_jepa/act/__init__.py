"""The system as one: it perceives, remembers, predicts, is surprised, plans, and acts safely.

system.py has the agent whose parts can be left out, episodes.py its episodes and the controls,
report.py the table of `vicreg-jepa act`, figure.py the film of an episode.
"""
