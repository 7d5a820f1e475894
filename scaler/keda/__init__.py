"""KEDA's gRPC contract."""
