"""Whole training steps and re-ranking: one module per system, `bench_<system>.py`, measured like an
op under the name `step_<system>`. README.md says what such a module gives.
"""
