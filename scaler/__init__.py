"""Demand: the gateway, KEDA's scaler, the planner, and what runs them on one machine."""
