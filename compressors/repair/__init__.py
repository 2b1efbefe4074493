"""Repair: compressed layers are fitted to data."""
