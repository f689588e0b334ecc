"""Changes to a trained network: adapters for finetuning, and quantised weights."""
