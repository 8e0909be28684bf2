"""Tests of vicregl."""
