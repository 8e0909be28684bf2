"""Compares the fused ops with the reference: steps per second and peak memory.

compare.py has the command; timing.py and memory.py measure.
"""
