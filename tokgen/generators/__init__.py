"""Generators: a transformer and an order, each with a loss and a decoding state machine."""
