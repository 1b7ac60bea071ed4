"""Write the kernels of one MoE layer for several architectures into a folder, and compile them. Needs no GPU.

python examples/generate_kernels.py kernels/ --model qwen3-30b-a3b --arch host sm_90a
"""

from __future__ import annotations

import argparse
from pathlib import Path

import flashmoe_gen as fmg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=fmg.PRESETS)
    parser.add_argument("--arch", nargs="+", default=["host", "sm_80", "sm_90a"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    # max_tokens sizes buffers, never the kernel: one text serves every batch size, world size and rank.
    spec = fmg.MoESpec.preset(options.model, max_tokens=4096)
    for arch in options.arch:
        for kernel in ("router", "moe"):
            source = fmg.generate(spec, arch=arch, kernel=kernel)
            path = source.write(options.folder)
            try:
                compiled = source.compile()
            except fmg.CompileError as error:  # no compiler for this architecture on this machine
                print(f"{path}  not compiled: {str(error).splitlines()[0]}")
                continue
            path.with_suffix(".so" if arch == "host" else ".cubin").write_bytes(compiled.image)
            how = "from the cache" if compiled.from_cache else f"in {compiled.seconds:.1f} s"
            print(
                f"{path}  {compiled.registers or '-'} registers, {compiled.spill_bytes} bytes of spills, compiled {how}"
            )


if __name__ == "__main__":
    main()
