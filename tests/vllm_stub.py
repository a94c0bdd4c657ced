"""Libraries that let vLLM's CUDA platform start without a GPU: two H200 are reported, nothing runs on them.

vLLM asks NVML for name, compute capability and memory, and its extensions need a libcuda to be loaded at all; every
driver call fails. Compiled by the C compiler of the machine.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("cc") or shutil.which("gcc")

DRIVER = (
    "CtxGetCurrent", "CtxSetCurrent", "DeviceGetAttribute", "DeviceGetCount", "DevicePrimaryCtxRetain",
    "DriverGetVersion", "GetErrorName", "GetErrorString", "GetProcAddress", "GetProcAddress_v2", "Init",
    "MemAddressFree", "MemAddressReserve", "MemCreate", "MemGetAllocationGranularity", "MemMap", "MemRelease",
    "MemSetAccess", "MemUnmap", "PointerGetAttribute", "TensorMapEncodeTiled",
)  # fmt: skip
"""What vLLM's libraries and torch look up, without the prefix `cu`."""
NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""

MANAGEMENT = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
static const unsigned long long BYTES = 141ull << 30;
#define OK(name, ...) int name(__VA_ARGS__) { return 0; }
OK(nvmlInit, void) OK(nvmlInit_v2, void) OK(nvmlInitWithFlags, unsigned flags) OK(nvmlShutdown, void)
const char *nvmlErrorString(int status) { return "stub"; }
int nvmlDeviceGetCount(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex(unsigned i, void **h) { *h = (void *)1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)1; return 0; }
int nvmlDeviceGetHandleByUUID(const char *id, void **h) { *h = (void *)1; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetName(void *h, char *text, unsigned size) { strncpy(text, "NVIDIA H200", size); return 0; }
int nvmlDeviceGetUUID(void *h, char *text, unsigned size) { strncpy(text, "GPU-0", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory *m) { m->total = m->free = BYTES; m->used = 0; return 0; }
int nvmlDeviceGetMemoryInfo_v2(void *h, memory_v2 *m) {
  m->total = m->free = BYTES; m->used = m->reserved = 0; return 0;
}
int nvmlDeviceGetNumaNodeId(void *h, unsigned *node) { return 3; }
int nvmlDeviceGetP2PStatus(void *a, void *b, int index, int *status) { *status = 0; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "580.00", size); return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 13000; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
"""


def build(folder: Path) -> Path:
    """Compile both into `folder`, which goes into LD_LIBRARY_PATH of a process. Returns the folder."""
    driver = "".join(f"int cu{name}(void) {{ return {NO_DEVICE}; }}\n" for name in DRIVER)
    for name, source in (("libcuda.so.1", driver), ("libnvidia-ml.so.1", MANAGEMENT)):
        assert COMPILER is not None
        command = [COMPILER, "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    return folder
