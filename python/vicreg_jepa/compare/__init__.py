"""The fused kernels against the reference: steps a second, and peak memory.

compare.py has the command, timing.py and memory.py the measuring.
"""
