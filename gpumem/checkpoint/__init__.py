"""Checkpoints on disk as chunks and a layout."""
