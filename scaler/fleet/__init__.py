"""What is heard of other machines: restore agents, by their streams, and the other replicas of the scaler."""
