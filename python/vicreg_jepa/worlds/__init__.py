"""Worlds: simulated environments in which actions move a dot, with a known true state.

world.py has the base class and the dynamics; two_rooms.py and maze.py have the two worlds, paths.py
the shortest path, policies.py the policies. episodes.py simulates episodes, store.py writes and
reads trajectories, minari_data.py reads those of Minari. environments.py has the worlds as
gymnasium environments, adapter.py the adapter for gymnasium environments of other packages.
"""
