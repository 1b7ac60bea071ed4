"""flashmoe_gen: generate, compile and run fused Mixture-of-Experts layers."""

from . import comm, compat, programs, reference
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
from .presets import PRESETS
from .programs import default_tile
from .render import KernelSource, generate
from .spec import MoESpec, Placement
from .tile import Schedule, TileConfig

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
    "Schedule",
    "SpecError",
    "TileConfig",
    "UnsupportedError",
    "comm",
    "compat",
    "default_tile",
    "generate",
    "programs",
    "reference",
]
