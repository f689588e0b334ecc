"""Scripts to copy elsewhere or run by themselves."""
