"""What is changed in a network after it was trained: what finetuning puts beside its weights."""
