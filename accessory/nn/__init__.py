"""The network's modules. They compute on tensors and know nothing of files or processes."""
