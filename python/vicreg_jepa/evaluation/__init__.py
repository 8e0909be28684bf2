"""What an encoder has learned: features, probes of images and of videos, and signs of collapse."""
