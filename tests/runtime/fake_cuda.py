"""A CUDA driver whose device is the CPU, compiled from a few lines of C, so that the real ctypes calls are what is tested."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
static int context, stream;
static __thread void *current;
static long allocated;
long keepsight_allocated(void) { return allocated; }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 8 : 7; return 0; }
int cuDevicePrimaryCtxRetain(void **made, int device) { *made = &context; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *wanted) { current = wanted; return wanted == &context ? 0 : 201; }
int cuStreamCreate(void **made, unsigned flags) { *made = &stream; return flags == 1 && current ? 0 : 201; }
int cuStreamDestroy_v2(void *which) { return which == &stream ? 0 : 400; }
int cuStreamSynchronize(void *which) { return which == &stream && current ? 0 : 400; }
int cuMemAlloc_v2(uint64_t *address, size_t size) {
    if (!current) return 201;
    if (size == 0) return 1;
    if (size > (1ul << 40)) return 2;
    *address = (uint64_t)malloc(size);
    allocated++;
    return 0;
}
int cuMemFree_v2(uint64_t address) { free((void *)address); allocated--; return current ? 0 : 201; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *which) {
    memcpy((void *)to, from, size);
    return which == &stream && current ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *which) {
    memcpy(to, (void *)from, size);
    return which == &stream && current ? 0 : 400;
}
"""


def compile_driver(folder: Path) -> Path:
    """The library's path; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a stand-in for the CUDA driver")
    (folder / "cuda.c").write_text(SOURCE)
    library = folder / "libcuda-on-the-cpu.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "cuda.c")], check=True, timeout=60)
    return library
