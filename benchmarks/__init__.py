"""Benchmarks: named workloads, one harness, rows on disk, plots and tables made from rows. Start
with README.md."""
