"""Compression during training, for any loop: pure torch, without Lightning."""
