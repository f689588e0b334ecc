"""Carries out the larger commands; `accessory.cli` has their arguments."""
