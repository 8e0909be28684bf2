"""Tests of what all ops stand on."""
