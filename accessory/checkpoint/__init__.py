"""Checkpoints: read any layout through lazy tensors, write folders whole or not at all, verify models by one hash."""
