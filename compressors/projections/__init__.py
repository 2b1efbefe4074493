"""Projections: the nearest tensor that can be stored cheaply."""
