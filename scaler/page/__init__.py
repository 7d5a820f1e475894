"""The page that shows the system's state in a browser, and the stream of events that keeps it up to date."""
