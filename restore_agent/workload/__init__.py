"""What runs inside engines. The standard library and gpumem's client are all that it needs."""
