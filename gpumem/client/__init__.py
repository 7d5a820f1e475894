"""Clients: an engine's, an operator's, and the adapter for torch."""
