"""Kernels for GPUs; imported where they are used, because Triton is an extra."""
