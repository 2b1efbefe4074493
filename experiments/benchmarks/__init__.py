"""Measurements of speed, memory and robustness. They run from a checkout, and no wheel has them."""
