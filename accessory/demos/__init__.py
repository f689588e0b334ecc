"""Programs to look at: what a newcomer starts first."""
