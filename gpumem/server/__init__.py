"""The server: who has what of each device."""
