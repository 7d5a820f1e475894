"""Kubernetes' API, for every room: one file speaks to it, and each room brings the resources and the types that it reads."""
