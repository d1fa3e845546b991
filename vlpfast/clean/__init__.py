"""Cleaning of noisy data by trained models: `score` gives every pair a score, `capfilt` writes
captions anew and filters them.

What is then read, by scores or with other captions, is `vlpfast.data`'s, which knows no model.
"""
