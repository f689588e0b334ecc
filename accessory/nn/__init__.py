"""The network: modules on tensors; no files, no processes."""
