"""`zerowake simulate`: what a policy would have done with a trace, on nodes that are modelled, under virtual time."""
