"""Processes: reads what a launcher set for this process, and starts, watches and ends ranks."""
