"""The gain of the kernels in a real training, and the surprise of a video model at impossible
physics.
"""
