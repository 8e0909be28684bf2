"""Tests of barlow."""
