"""Benchmarks: each result is first checked, then timed."""
