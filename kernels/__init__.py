"""Faster versions of functions of the decoder."""
