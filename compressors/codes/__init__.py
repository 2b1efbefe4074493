"""Codes: tensors in stored form, and how they are found in plain ones."""
