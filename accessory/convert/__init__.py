"""The commands on checkpoints: each turns a checkpoint into another one, or into a report about it."""
