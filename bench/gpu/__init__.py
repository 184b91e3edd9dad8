"""Benchmarks on an NVIDIA GPU. `bench/gpu.sh` runs them; `python -m bench.gpu.<name>` runs one."""
