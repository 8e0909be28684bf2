"""The methods, each a page over the public API of vicreg_kernels."""
