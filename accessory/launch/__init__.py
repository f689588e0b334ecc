"""Processes: what a launcher says of this one, and how ranks are started, watched and ended."""
