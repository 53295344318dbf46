"""Handlers of layers that many architectures share, and what they have in common."""
