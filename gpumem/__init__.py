"""GPU memory held ahead of need. Its seat: README.md says what will live here."""
