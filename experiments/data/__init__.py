"""Data sets and their loaders."""
