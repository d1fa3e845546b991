"""Cleaning of noisy data by trained models: scores of pairs, captions written anew and filtered.

What is kept by scores is `vlpfast.data`'s, which knows no model.
"""

from vlpfast.clean.score import ScoreOptions, score

__all__ = ["ScoreOptions", "score"]
