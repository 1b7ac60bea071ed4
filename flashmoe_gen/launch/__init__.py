"""Loading and launching compiled kernels, one module per target."""

from .choose import choose

__all__ = ["choose"]
