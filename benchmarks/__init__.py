"""Measurements beside the peers: `python -m benchmarks`, on Hopper GPUs."""
