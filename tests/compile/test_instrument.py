"""Tracing and delays: compiled in when asked for, and nothing at all when not."""

from __future__ import annotations

import importlib
import re
from collections import Counter

import numpy as np
import pytest

import flashmoe_gen as fmg
from flashmoe_gen.compile import compile_text
from flashmoe_gen.cubin import _sections

try:
    importlib.import_module("cupy.cuda").nvrtc.getVersion()
except (ImportError, OSError, RuntimeError) as error:
    pytest.skip(f"CuPy or NVRTC cannot be loaded: {error}", allow_module_level=True)

SPEC = fmg.MoESpec(256, 128, 8, 2, max_tokens=64)
POINTS = re.compile(r"^\s*(const Span \w+(\(| = span_of\().*;|delay\(call\);)$", re.MULTILINE)


def code(text: str, name: str) -> Counter[int]:
    """How often a kernel has which operation: the low 12 bits of its 16-byte instructions.

    Their order and their registers are ptxas's draw, also between texts that mean the same.
    """
    image = compile_text(text, arch="sm_90a", name=name).data
    section = _sections(image)[f".text.{name}"]
    return Counter((np.frombuffer(image, "<u8", section.size // 8, section.offset)[::2] & np.uint64(0xFFF)).tolist())


@pytest.mark.parametrize("program", ["wgmma", "mma"])
def test_costs_nothing_when_it_is_off(program: str) -> None:
    tile = fmg.default_tile(SPEC, "sm_90a", program)  # type: ignore[arg-type]
    source = fmg.generate(SPEC, arch="sm_90a", tile=tile)
    bare, points = POINTS.subn("", source.text)
    assert points > 20 and not re.search(r"const Span|delay\(call\);", bare)
    assert code(source.text, source.name) == code(bare, source.name)
    for instrument in (fmg.Instrument(trace_events=1), fmg.Instrument(delay_ns=1)):
        with_it = fmg.generate(SPEC, arch="sm_90a", tile=tile, instrument=instrument)
        assert code(with_it.text, with_it.name) != code(source.text, source.name)
