"""What Kubernetes and KEDA would do, on one machine."""
