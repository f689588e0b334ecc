"""Checkpoints: every layout read through lazy tensors, written whole or not at all, verified by one hash."""
