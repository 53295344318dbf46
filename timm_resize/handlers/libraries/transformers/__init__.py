"""Handlers for Hugging Face transformers, one file per `modeling_*.py` of it."""
