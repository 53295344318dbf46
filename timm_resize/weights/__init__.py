"""Weights in: whose names, of which size, from which file."""
