"""A whole model: loads a checkpoint folder and generates text."""
