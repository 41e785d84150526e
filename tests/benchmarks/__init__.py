"""Tests of the benchmarks that are more than a loop over the package."""
