"""The agent's part on a node of Kubernetes: pods, their containers, their GPUs."""
