"""Sweepers for Hydra, which looks for them in this namespace, and imports them for every command:
what they need of torch they import when they run."""
