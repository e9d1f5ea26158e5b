"""Measurements beside the peers: `python -m benchmarks gemm|layer|reload`, on Hopper GPUs."""
