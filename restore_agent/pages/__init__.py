"""Pages of memory: taken out of CRIU's images, and filled into restored processes."""
