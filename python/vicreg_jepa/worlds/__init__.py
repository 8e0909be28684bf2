"""Worlds in which a dot acts: what it sees, what it does, and what is true of it.

world.py says what a world is and moves the dot; two_rooms.py and maze.py are worlds, paths.py is
the shortest way in them, policies.py acts in them. episodes.py plays them, store.py writes and
reads trajectories. registration.py and environments.py make gymnasium environments of the worlds,
adapter.py plays the environments of others.
"""
