"""tokgen: images into discrete tokens, and tokens into images, in JAX."""

__version__ = "0.1.0"
