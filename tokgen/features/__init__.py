"""Frozen networks that images are measured by."""
