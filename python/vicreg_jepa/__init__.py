"""A thin trainer for joint-embedding models, on the public API of vicreg_kernels.

config/ has the settings of a run, methods/ the training methods, training/ the loop. evaluation/
and surprise/ measure what was learned, compare/ times it, and demo/ shows all of it. They use
data/, distributed/, ops/, models/ and files/; physics/ simulates videos,
worlds/ simulates environments that take actions.
"""
