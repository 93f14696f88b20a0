"""Quantizers: latent vectors into tokens and back, one file each; always float32 inside."""
