"""Loading and launching compiled kernels, one module per target."""
