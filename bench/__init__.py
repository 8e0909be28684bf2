"""Benchmarks: this library's ops against the published formulas and the best plain PyTorch."""
