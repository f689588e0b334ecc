"""Triton kernels for GPUs. Functions that use them import them, because Triton is an extra."""
