"""Tests of ema."""
