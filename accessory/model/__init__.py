"""A whole model: folder in, text out."""
