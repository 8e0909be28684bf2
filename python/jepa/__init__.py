"""A thin trainer for joint-embedding models, on the public API of vicreg_kernels.

A method (`vicreg.VICReg`; others sit beside it) turns a batch of images into a loss; `train` runs
any method; `probe` says what its encoder learned; `demo` compares two losses on real images.
"""
