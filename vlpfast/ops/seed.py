"""Seeds on the host: one integer seed fans out to every step, layer and use without touching a
global generator.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def fold_seed(seed: int, *salts: int) -> int:
    """A new seed in [0, 2**63) for each sequence of salts (step number, rank, layer, purpose), by
    splitmix64's finaliser.
    """
    for salt in salts:
        seed = (seed + (salt + 1) * 0x9E3779B97F4A7C15) & _MASK
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & _MASK
        seed ^= seed >> 31
    return seed & (_MASK >> 1)
