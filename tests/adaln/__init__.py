"""Tests of adaptive layer norm."""
