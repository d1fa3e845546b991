"""Triton kernels and their launchers, one file an op; they import torch and Triton only.

Import it as `vlpfast.kernels`. No autograd and no argument checks: those are in vlpfast.ops. From
the repository's root it is importable as plain `kernels` too, and must be: transformers probes for
a package of that name and has to find one without a version, not an error.
"""
