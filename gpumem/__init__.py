"""GPU memory held ahead of need: filled before anyone asks, lent to processes that come and go, shared by all that want the same bytes."""
