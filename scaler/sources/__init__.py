"""What is asked of models past all gateways: sources that are read, and the one object that keeps the ledger told of them."""
