"""Products, attention and routing as functions of tensors; each picks its kernel by device, dtype and size."""
