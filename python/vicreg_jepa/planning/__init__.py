"""Planning with a world model, and a shield between the planner and the world.

model.py has the protocol of a model, and the worlds' own dynamics as one. energies.py has what a
plan minimises, planner.py the loop that all planners share, planners.py the planners, noise.py
their random numbers, captured.py a planner as a CUDA graph. evaluate.py runs episodes,
and ways.py lists how a model and its controls plan in them. guardrails.py has the constraints,
reach.py the positions that a step can reach, shield.py the shield, conformal.py the margins of
probes, penalties.py the constraints as terms of an energy, adversaries.py the proof that the
shield holds.
"""
