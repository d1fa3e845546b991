"""Guards of small CPU costs that a user pays on every call, run by pytest-benchmark."""
