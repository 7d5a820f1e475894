"""Snapshots on their way between this node and stores: folders, buckets, other agents."""
