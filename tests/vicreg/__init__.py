"""Tests of vicreg."""
