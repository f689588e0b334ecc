"""The assembly of networks, from opened checkpoints to a decoder with its values, and adapters beside it."""
