"""Tokenizers: an encoder, a quantizer and a decoder."""
