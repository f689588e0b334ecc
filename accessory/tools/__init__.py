"""Scripts that users copy next to a checkpoint, or run directly."""
