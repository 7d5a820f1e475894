"""The node's mechanisms, one file each: CRIU, CUDA, huge pages, weights lent by gpumem."""
