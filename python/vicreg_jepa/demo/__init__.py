"""What the kernels gain in a real training, and what a video model makes of impossible physics."""
