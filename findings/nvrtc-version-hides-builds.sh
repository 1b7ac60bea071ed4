#!/usr/bin/env bash
# nvrtcVersion() names major and minor alone: two builds of NVRTC 13.2 say the same version and give different cubins for the
# same text and options (the note that names the tools, and the kernel's attributes in .nv.info). Who keys a cache of cubins by
# nvrtcVersion() serves the old build's cubins after an upgrade.
#
# nvidia-cuda-nvrtc 13.2.78 and 13.2.86 (Linux x86-64), asked through ctypes; no GPU, no driver.
# Exits 0 while both say 13.2 and their cubins for sm_90a differ in these sections.
set -euo pipefail
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for build in 13.2.78 13.2.86; do
  python3 -m pip install -q --no-deps --target "$work/$build" "nvidia-cuda-nvrtc==$build"
done
cat > "$work/ask.py" <<'PY'
import ctypes, glob, hashlib, json, struct, sys

TEXT = b"""
extern "C" __global__ void unit(const float* x, float* y, int n) {
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += 32) sum += x[i] * x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  for (int i = threadIdx.x; i < n; i += 32) y[i] = x[i] * rsqrtf(sum);
}
"""

def check(status):
    assert status == 0, status

def sections(image):
    (table,), (size, count, names) = struct.unpack_from("<Q", image, 40), struct.unpack_from("<HHH", image, 58)
    heads = [struct.unpack_from("<IIQQQQ", image, table + i * size) for i in range(count)]
    text = lambda at: image[at:image.index(b"\0", at)].decode()
    return {text(heads[names][4] + h[0]): image[h[4]:h[4] + h[5]] for h in heads}

folder = sys.argv[1] + "/nvidia/**/"
ctypes.CDLL(glob.glob(folder + "libnvrtc-builtins.so*", recursive=True)[0], ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(glob.glob(folder + "libnvrtc.so.13", recursive=True)[0])
major, minor, program, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t()
check(nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), TEXT, b"unit.cu", 0, None, None))
status = nvrtc.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(b"-arch=sm_90a"))
if status:
    check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    sys.exit(log.value.decode())
check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
image = ctypes.create_string_buffer(size.value)
check(nvrtc.nvrtcGetCUBIN(program, image))
found = {name: hashlib.sha256(data).hexdigest()[:12] for name, data in sections(image.raw).items() if name}
print(json.dumps({"version": f"{major.value}.{minor.value}", "sections": found}))
PY
python3 "$work/ask.py" "$work/13.2.78" > "$work/old.json"
python3 "$work/ask.py" "$work/13.2.86" > "$work/new.json"
python3 - "$work" <<'PY'
import json, sys

old, new = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("old", "new"))
differ = sorted(name for name in old["sections"] if old["sections"][name] != new["sections"].get(name))
print(f"13.2.78 says {old['version']}, 13.2.86 says {new['version']}; sections that differ: {', '.join(differ)}")
assert old["version"] == new["version"] == "13.2"
assert ".nv.info.unit" in differ and ".note.nv.tkinfo" in differ
PY
echo "seen: one version, two compilers"
