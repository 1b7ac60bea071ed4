"""flashmoe_gen: generate, compile and run fused Mixture-of-Experts layers."""

from . import comm, reference
from .counters import LayerStats
from .errors import (
    CacheError,
    CommError,
    CompileError,
    FlashMoEError,
    KernelTimeoutError,
    SpecError,
    UnsupportedError,
)
from .experts import Experts
from .instrument import Instrument
from .layer import MoELayer
from .plan import TileConfig, default_tile
from .presets import PRESETS
from .render import KernelSource, generate
from .spec import MoESpec, Placement

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CacheError",
    "CommError",
    "CompileError",
    "Experts",
    "FlashMoEError",
    "Instrument",
    "KernelSource",
    "KernelTimeoutError",
    "LayerStats",
    "MoELayer",
    "MoESpec",
    "Placement",
    "SpecError",
    "TileConfig",
    "UnsupportedError",
    "comm",
    "default_tile",
    "generate",
    "reference",
]
