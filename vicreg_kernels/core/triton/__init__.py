"""Device code and launch facts that the Triton kernels of several ops share."""
