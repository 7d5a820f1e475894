"""Bytes on their way to a device: the child process that moves them, its files and its arena."""
