"""Weights to and from other formats and other people."""
