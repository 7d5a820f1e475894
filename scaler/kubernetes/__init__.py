"""The scaler's part in a cluster: objects, controller, admission webhook."""
