"""Finetuning: the loop, its optimiser and state, what it writes down and shows. Knows token ids and tensors."""
