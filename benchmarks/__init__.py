"""Benchmarks: each checks its results, then times them beside the baseline, in the same run."""
