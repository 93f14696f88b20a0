"""Frozen networks: feature extractors, and the perceptual distances on them."""
