"""Snapshots on this node's disk: what they are, of what they are made, and what they fit."""
