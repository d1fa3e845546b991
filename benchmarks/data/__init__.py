"""Benchmarks of data loading: rates and CPU seconds, not kernels."""
