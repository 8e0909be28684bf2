"""The Triton backend: imported only where it runs."""
