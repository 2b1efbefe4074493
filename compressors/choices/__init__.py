"""Choices: which weights, widths and ranks a budget is spent on, and when."""
