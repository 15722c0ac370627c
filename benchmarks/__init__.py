"""Measurements: each module is one, started with `python -m benchmarks.NAME`; results stand in docs/results.md."""
