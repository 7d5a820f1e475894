"""The way of a request: routed, held or sent to a replica, answered."""
