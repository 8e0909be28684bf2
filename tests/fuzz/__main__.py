"""`python -m fuzz [op ...]`: random calls of each op, each op in a process of its own, so that a
crash is a failure with a line like any other.

VICREG_KERNELS_FUZZ_SECONDS: how long for each op, 60 by default. VICREG_KERNELS_FUZZ_SEED: the
first seed, by default another one every time. The seed of a line is printed with it;
`python -m fuzz --seed vicreg_loss/17` runs that one alone.
"""
