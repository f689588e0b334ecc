"""Sampling and generation: token ids and tensors; never text, never files."""
