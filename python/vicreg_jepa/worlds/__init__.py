"""Worlds in which a dot acts: what it sees, what it does, and what is true of it.

world.py says what a world is and moves the dot; two_rooms.py and maze.py are worlds, paths.py is
the shortest way in them, policies.py acts in them. episodes.py plays them, store.py writes and
reads trajectories, minari_data.py reads those of Minari. environments.py makes gymnasium
environments of the worlds, adapter.py plays the environments of others.
"""
