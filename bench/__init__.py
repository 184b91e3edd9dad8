"""Benchmarks: every number beside its ceiling and its peer. Run as `python -m bench.<name>`."""
