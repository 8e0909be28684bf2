"""Tests of the benchmarks and of `make gpu`."""
