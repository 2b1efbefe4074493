"""Experiments: the command line, data, models, benchmarks and figures."""
