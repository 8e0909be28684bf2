"""Tests of the trainer below python/."""
