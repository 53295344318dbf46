"""Weights out: folders that stock timm opens, and the Hugging Face Hub."""
