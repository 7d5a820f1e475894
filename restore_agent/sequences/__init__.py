"""What is done with snapshots, step by step: captured, staged, restored, kept as standbys."""
