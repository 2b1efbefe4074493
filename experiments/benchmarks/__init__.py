"""Measurements of speed, memory and robustness; run from a checkout."""
