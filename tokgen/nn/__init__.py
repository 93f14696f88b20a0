"""Layers: vectors in, vectors out; they know neither tokenizers nor generators."""
