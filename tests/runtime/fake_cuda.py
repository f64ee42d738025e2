"""A CUDA driver whose device is the CPU, compiled from some lines of C and put where cuda-python looks for the real one.

What is tested is thus cuda-python itself with every call that the code makes. The driver is as strict as CUDA where a mistake of
ours would show: a current context, copies inside of what is allocated, and nothing in a capture that a graph can't hold.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

HAS_DRIVER = ctypes.util.find_library("cuda") is not None
"""Whether this machine has a real one. Then the double is not used: one process can load one."""

SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
enum { OK, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
enum { MOST = 4096 };

static int context, stream, streams;
static __thread void *current;
static struct { uint64_t at; size_t size; } blocks[MOST];
static int block_count;

typedef void (*work)(void);
typedef struct { int copies; work do_it; void *to; const void *from; size_t size; } node;
typedef struct { node nodes[16]; int count; } graph;
static graph *capture;
static int broken, graphs, launches;

int keepsight_allocated(void) { return block_count; }
int keepsight_streams(void) { return streams; }
int keepsight_graphs(void) { return graphs; }
int keepsight_launches(void) { return launches; }
int keepsight_capturing(void) { return capture != 0; }
void keepsight_record(work do_it) { node n = {0, do_it}; capture->nodes[capture->count++] = n; }

static int inside(uint64_t at, size_t size) {
    for (int i = 0; i < block_count; i++)
        if (blocks[i].at <= at && at + size <= blocks[i].at + blocks[i].size) return 1;
    return 0;
}
static int forbidden(void) { if (capture) broken = 1; return capture != 0; }
static int copy(void *to, const void *from, size_t size, void *which) {
    if (which != &stream) return INVALID_HANDLE;
    if (!current) return INVALID_CONTEXT;
    if (capture) { node n = {1, 0, to, from, size}; capture->nodes[capture->count++] = n; return OK; }
    memcpy(to, from, size);
    return OK;
}

static int init(unsigned flags) { return OK; }
static int device_get(int *device, int index) { *device = index; return OK; }
static int device_name(char *name, int size, int device) { strncpy(name, "Orin", size); return OK; }
static int device_attribute(int *value, int which, int device) { *value = which == 75 ? 8 : 7; return OK; }
static int retain(void **made, int device) { *made = &context; return OK; }
static int release(int device) { return OK; }
static int set_current(void *wanted) { current = wanted; return wanted == &context ? OK : INVALID_CONTEXT; }
static int stream_create(void **made, unsigned flags) {
    if (flags != 1 || !current) return INVALID_CONTEXT;
    *made = &stream;
    streams++;
    return OK;
}
static int priority = 1;
int keepsight_priority(void) { return priority; }
static int priority_range(int *least, int *greatest) {
    if (!current) return INVALID_CONTEXT;
    *least = 0; *greatest = -5;  /* lower numbers go first */
    return OK;
}
static int stream_create_with_priority(void **made, unsigned flags, int wanted) {
    if (wanted > 0 || wanted < -5) return INVALID_VALUE;
    priority = wanted;
    return stream_create(made, flags);
}
static int stream_destroy(void *which) { streams--; return which == &stream ? OK : INVALID_HANDLE; }
static int stream_synchronize(void *which) {
    if (forbidden()) return CAPTURE_UNSUPPORTED;
    return which == &stream && current ? OK : INVALID_HANDLE;
}
static int allocate(uint64_t *address, size_t size) {
    if (forbidden()) return CAPTURE_UNSUPPORTED;
    if (!current) return INVALID_CONTEXT;
    if (!size) return INVALID_VALUE;
    if (size > (1ul << 40) || block_count == MOST) return OUT_OF_MEMORY;
    *address = (uint64_t)aligned_alloc(256, (size + 255) / 256 * 256);
    memset((void *)*address, 0xff, size);  /* as floats: nan */
    blocks[block_count].at = *address;
    blocks[block_count++].size = size;
    return OK;
}
static int release_memory(uint64_t address) {
    for (int i = 0; i < block_count; i++)
        if (blocks[i].at == address) {
            blocks[i] = blocks[--block_count];
            free((void *)address);
            return current ? OK : INVALID_CONTEXT;
        }
    return INVALID_VALUE;
}
static int to_device(uint64_t to, const void *from, size_t size, void *which) {
    return inside(to, size) ? copy((void *)to, from, size, which) : INVALID_VALUE;
}
static int to_host(void *to, uint64_t from, size_t size, void *which) {
    return inside(from, size) ? copy(to, (void *)from, size, which) : INVALID_VALUE;
}
static int on_device(uint64_t to, uint64_t from, size_t size, void *which) {
    return inside(to, size) && inside(from, size) ? copy((void *)to, (void *)from, size, which) : INVALID_VALUE;
}
static int begin_capture(void *which, int mode) {
    if (which != &stream || capture || mode != 1) return INVALID_VALUE;
    capture = calloc(1, sizeof(graph));
    broken = 0;
    return OK;
}
static int end_capture(void *which, void **made) {
    graph *was = capture;
    capture = 0;
    *made = broken ? 0 : was;
    return broken ? CAPTURE_INVALIDATED : OK;
}
static int instantiate(void **made, void *which, uint64_t flags) {
    *made = calloc(1, sizeof(graph));
    memcpy(*made, which, sizeof(graph));
    graphs++;
    return OK;
}
static int destroy_graph(void *which) { free(which); return OK; }
static int destroy_executable(void *which) { graphs--; free(which); return OK; }
static int launch(void *which, void *on) {
    graph *it = which;
    if (on != &stream || !current) return INVALID_HANDLE;
    launches++;
    for (int i = 0; i < it->count; i++) {
        if (it->nodes[i].copies) memcpy(it->nodes[i].to, it->nodes[i].from, it->nodes[i].size);
        else it->nodes[i].do_it();
    }
    return OK;
}

typedef struct { struct timespec at; int recorded; } event;
static int events;
int keepsight_events(void) { return events; }
static int event_create(event **made, unsigned flags) {
    if (!current || flags) return INVALID_CONTEXT;
    *made = calloc(1, sizeof(event));
    events++;
    return OK;
}
static int event_destroy(event *which) { events--; free(which); return OK; }
static int event_record(event *which, void *on) {
    if (on != &stream || !current) return INVALID_HANDLE;
    if (forbidden()) return CAPTURE_UNSUPPORTED;  /* it would be recorded by the graph, at another time */
    clock_gettime(CLOCK_MONOTONIC, &which->at);
    which->recorded = 1;
    return OK;
}
static int event_synchronize(event *which) { return current && which->recorded ? OK : INVALID_HANDLE; }
static int event_elapsed(float *ms, event *from, event *to) {
    if (!from->recorded || !to->recorded) return INVALID_HANDLE;
    *ms = (to->at.tv_sec - from->at.tv_sec) * 1e3 + (to->at.tv_nsec - from->at.tv_nsec) / 1e6;
    return OK;
}

static struct { const char *name; void *function; } functions[] = {
    {"cuInit", init}, {"cuDeviceGet", device_get}, {"cuDeviceGetName", device_name},
    {"cuDeviceGetAttribute", device_attribute}, {"cuDevicePrimaryCtxRetain", retain},
    {"cuDevicePrimaryCtxRelease", release}, {"cuCtxSetCurrent", set_current}, {"cuStreamCreate", stream_create},
    {"cuStreamCreateWithPriority", stream_create_with_priority}, {"cuCtxGetStreamPriorityRange", priority_range},
    {"cuStreamDestroy", stream_destroy}, {"cuStreamSynchronize", stream_synchronize}, {"cuMemAlloc", allocate},
    {"cuMemFree", release_memory}, {"cuMemcpyHtoDAsync", to_device}, {"cuMemcpyDtoHAsync", to_host},
    {"cuMemcpyDtoDAsync", on_device}, {"cuStreamBeginCapture", begin_capture}, {"cuStreamEndCapture", end_capture},
    {"cuGraphInstantiateWithFlags", instantiate}, {"cuGraphInstantiate", instantiate},
    {"cuGraphDestroy", destroy_graph}, {"cuGraphExecDestroy", destroy_executable}, {"cuGraphLaunch", launch},
    {"cuEventCreate", event_create}, {"cuEventDestroy", event_destroy}, {"cuEventRecord", event_record},
    {"cuEventSynchronize", event_synchronize}, {"cuEventElapsedTime", event_elapsed},
};
int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
    *found = 0;
    for (int i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!strcmp(name, functions[i].name)) *found = functions[i].function;
    if (status) *status = !*found;
    return *found ? OK : NOT_FOUND;
}
"""


@cache
def load_driver() -> ctypes.CDLL:
    """The double, in this process; skips the test where there is a real driver, or no C compiler."""
    if HAS_DRIVER:
        pytest.skip("this machine has a CUDA driver: tests marked `device` use it")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a stand-in for the CUDA driver")
    folder = Path(mkdtemp())
    (folder / "cuda.c").write_text(SOURCE)
    # cuda-python loads libcuda.so.1 by its name, and finds the library of that name which is loaded already.
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(folder / "cuda.c")]
    subprocess.run(command, check=True, timeout=60)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
