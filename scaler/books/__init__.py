"""Pure accounts and rules: demand, fairness, activations, triggers, the HPA's arithmetic. No I/O, no clock but the one given."""
