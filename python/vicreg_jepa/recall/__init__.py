"""What a memory is for: an agent that sees windows of a maze finds back to what it saw before.

agent.py has the agent: where it is, what it wants, what it does. graph.py has the remembered places
and the ways between them, places.py the models that plans are made with, tour.py the first visit on
which the agent is led, visits.py all visits, absence.py the surprise at what changed out of view.
report.py measures it all beside controls, figure.py draws an episode.
"""
