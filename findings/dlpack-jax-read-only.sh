#!/usr/bin/env bash
# JAX arrays are immutable and may share memory, but JAX exports them as a DLPack capsule from before version 1.0, which has no
# read-only flag, also to a consumer that asks for max_version=(1, 0). NumPy's arrays, asked in the same way, answer with a
# versioned capsule whose flag says whether they may be written. A consumer cannot learn from JAX's that it must not write.
#
# jax 0.10.2 and numpy 2.4.6 on the CPU; the capsules are looked at with ctypes, nothing is written.
# Exits 0 while JAX answers "dltensor" and NumPy "dltensor_versioned" with the read-only flag of a read-only array.
set -euo pipefail
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import ctypes

import jax
import numpy as np

name_of = ctypes.pythonapi.PyCapsule_GetName
name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

frozen = np.arange(4.0)
frozen.flags.writeable = False
jax_capsule = jax.numpy.arange(4.0).__dlpack__(max_version=(1, 0))
numpy_capsule = frozen.__dlpack__(max_version=(1, 0))
# DLManagedTensorVersioned: version (two uint32), manager, deleter (pointers), flags (uint64); bit 0: read-only
flags = ctypes.c_uint64.from_address(pointer_of(numpy_capsule, b"dltensor_versioned") + 24).value
print(f"jax {jax.__version__}: {name_of(jax_capsule).decode()}")
print(f"numpy {np.__version__}: {name_of(numpy_capsule).decode()}, read-only flag {flags & 1}")
assert name_of(jax_capsule) == b"dltensor"
assert name_of(numpy_capsule) == b"dltensor_versioned" and flags & 1
PY
echo "seen: an immutable array exported without the flag that says so"
