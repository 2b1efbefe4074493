"""Hydra configuration groups; this file makes them importable as a package."""
