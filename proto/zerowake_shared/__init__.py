"""What both sides of a socket need: TLS with reload, logs, back-off, sockets in a network namespace, Kubernetes' API."""
