"""Where an engine lives: a sandbox, a container, or the machine itself."""
