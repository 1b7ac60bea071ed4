"""flashmoe_gen: generate, compile and run fused Mixture-of-Experts layers."""

from .errors import (
    CacheError,
    CommError,
    CompileError,
    FlashMoEError,
    KernelTimeoutError,
    SpecError,
    UnsupportedError,
)
from .plan import TileConfig, default_tile
from .render import KernelSource, generate
from .spec import MoESpec, Placement

__version__ = "0.1.0"
