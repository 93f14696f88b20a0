"""Weights that others published, read and mapped onto our models."""
