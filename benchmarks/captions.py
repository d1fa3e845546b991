"""Lengths of captions: what texts in benchmarks are like."""

from __future__ import annotations

# Tokens of a caption with its start and end, one in sixteen each; mean 13. ALBEF cuts at 25.
CAPTION_LENS = (8, 9, 10, 10, 11, 11, 12, 12, 12, 13, 13, 14, 15, 16, 17, 25)


def caption_lens(size: int) -> list[int]:
    """Lengths of `size` captions, evenly over the distribution."""
    count = len(CAPTION_LENS)
    step = max(1.0, count / size)
    return [CAPTION_LENS[int((i + 0.5) * step) % count] for i in range(size)]
