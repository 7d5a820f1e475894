"""What the scaler shows of itself."""
