"""Tests of sigreg."""
