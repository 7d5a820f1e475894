"""The node's mechanisms, one file each: CRIU, CUDA, weights lent by gpumem."""
