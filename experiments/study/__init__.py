"""A study: what the runs of a sweep say together."""
