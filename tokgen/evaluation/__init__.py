"""Held-out validation, and samples scored against references under a protocol."""
