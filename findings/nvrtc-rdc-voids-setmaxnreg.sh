#!/usr/bin/env bash
# A Hopper kernel that redistributes registers between its warps (PTX setmaxnreg) compiles under NVRTC with -rdc=true without an
# error or a warning: a line of kind "info" in the log (C7504) says that setmaxnreg was ignored, and the instruction is missing from
# the machine code. Without -rdc=true the same text keeps it. Who links such a kernel (with NVSHMEM's device library, say) loses
# the registers silently.
#
# nvidia-cuda-nvrtc-cu12 12.9.86 (Linux x86-64), asked through ctypes; no GPU, no driver.
# Exits 0 while both compilations succeed and only the one with -rdc=true says C7504.
set -euo pipefail
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install -q --no-deps --target "$work" "nvidia-cuda-nvrtc-cu12==12.9.86"
python3 - "$work" <<'PY'
import ctypes, glob, sys

TEXT = b"""
extern "C" __global__ void __launch_bounds__(256, 1) split(const float* x, float* y) {
  __shared__ float kept[128];
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    kept[threadIdx.x] = x[threadIdx.x];
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  }
  __syncthreads();
  if (threadIdx.x >= 128) y[threadIdx.x - 128] = 2 * kept[threadIdx.x - 128];
}
"""
folder = sys.argv[1] + "/nvidia/**/"
ctypes.CDLL(glob.glob(folder + "libnvrtc-builtins.so*", recursive=True)[0], ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(glob.glob(folder + "libnvrtc.so.12", recursive=True)[0])


def check(status):
    assert status == 0, status


def log_of(*options):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), TEXT, b"split.cu", 0, None, None))
    check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)))
    check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetProgramLog(program, log))
    return log.value.decode()


whole = log_of(b"-arch=sm_90a", b"--ptxas-options=-v")
apart = log_of(b"-arch=sm_90a", b"--ptxas-options=-v", b"-rdc=true")
lines = [line.strip() for line in apart.splitlines() if "setmaxnreg" in line]
print("whole program:", "C7504" if "C7504" in whole else "setmaxnreg kept")
print("-rdc=true:    ", lines[0] if lines else "setmaxnreg kept")
assert "C7504" not in whole and "C7504" in apart and "info" in lines[0]
PY
echo "seen: a successful compilation that dropped setmaxnreg"
