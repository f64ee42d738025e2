"""What a probe does in its own process.

`python -m keepsight.runtime.doctor.attempts NAME [ARGUMENT...]` prints one line of JSON.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

from keepsight.runtime.doctor.probes import MARK
from keepsight.streams.errors import KeepsightError

__all__ = ["ATTEMPTS", "main"]

Answer = dict[str, Any]

# y = (x + x) @ x of float32 [2, 2], opset 13: one kernel of ONNX Runtime's own and one of a matrix library. Written with
# onnx.helper; the runtime has no onnx package.
_GRAPH = (
    "CAgSADpQCg4KAXgKAXgSAXMiA0FkZAoRCgFzCgF4EgF5IgZNYXRNdWwSAWdaEwoBeBIOCgwIARIICgIIAgoCCAJiEwoBeRIOCgwIARIICgIIAgoCCAJCBAoAEA0="
)
_NAME_LENGTH = 256
# CUdevice_attribute of cuda.h.
_MAJOR, _MINOR = 75, 76
# What a live session on a board reads from, by the pipelines that `keepsight stream describe` shows.
_SOURCES = ("clip.mp4", "rtsp://camera/stream", "v4l2:///dev/video0", "http://camera/clip.mp4", "test://smpte")


def cuda() -> Answer:
    """The driver's CUDA version and the GPUs, without cuda-python."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"failure": f"no CUDA driver: {error}"}
    number, second = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0)
    if status:
        return {"failure": f"the CUDA driver refuses to start: cuInit gives {status}"}
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    driver.cuDeviceGetCount(ctypes.byref(number))
    gpus = []
    for index in range(number.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_LENGTH)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, _NAME_LENGTH, device)
        driver.cuDeviceGetAttribute(ctypes.byref(number), _MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(second), _MINOR, device)
        gpus.append({"name": name.value.decode("utf-8", "replace"), "sm": 10 * number.value + second.value})
    return {"version": version, "gpus": gpus}


def tensorrt() -> Answer:
    """TensorRT's bindings and its libraries."""
    from keepsight.runtime.graphs.tensorrt_module import import_tensorrt

    trt = import_tensorrt()
    trt.Builder(trt.Logger(trt.Logger.ERROR))  # the bindings load without a driver that fits; this does not
    return {"version": str(trt.__version__)}


def llama() -> Answer:
    """llama-cpp-python: whether it was built for a GPU, and for which ones."""
    import llama_cpp

    about = llama_cpp.llama_print_system_info()
    return {
        "version": str(llama_cpp.__version__),
        "offload": bool(llama_cpp.llama_supports_gpu_offload()),
        "about": about.decode("utf-8", "replace") if isinstance(about, bytes) else str(about),
    }


def onnxruntime() -> Answer:
    """ONNX Runtime and the providers that it lists, working or not."""
    import onnxruntime as ort

    return {"version": str(ort.__version__), "providers": list(ort.get_available_providers())}


def provider(name: str) -> Answer:
    """Run a small graph on one provider: the list says what was compiled in, and a session falls back without a word."""
    import numpy as np
    import onnxruntime as ort

    session = ort.InferenceSession(base64.b64decode(_GRAPH), providers=[name])
    if name not in session.get_providers():
        return {"failure": f"a session that asks for it gets {', '.join(session.get_providers())}"}
    x = np.array([[1, 2], [3, 4]], np.float32)
    (y,) = session.run(None, {"x": x})
    return {} if np.array_equal(y, 2 * x @ x) else {"failure": f"it computes {y.tolist()}, not {(2 * x @ x).tolist()}"}


def gstreamer(board: str) -> Answer:
    """GStreamer, and the elements that a board's pipelines lack, with the package of each and what they are for."""
    from keepsight.streams.boards import BOARDS
    from keepsight.streams.describe import describe
    from keepsight.streams.gst import load_gst
    from keepsight.streams.uri import SourceURI
    from keepsight.streams.view import View

    version, missing = load_gst().version_string(), dict[str, Answer]()
    for source in (*_SOURCES, *(("csi://0",) if board == "jetson" else ())):
        uri = SourceURI.parse(source)
        found = describe(uri, View((224, 224)), "newest" if uri.is_camera else "every", BOARDS[board])
        for element, package in found.missing.items():
            missing.setdefault(element, {"package": package, "sources": []})["sources"].append(uri.kind)
    return {"version": version, "missing": missing}


ATTEMPTS: dict[str, Callable[..., Answer]] = {
    "cuda": cuda, "tensorrt": tensorrt, "llama": llama, "onnxruntime": onnxruntime, "provider": provider, "gstreamer": gstreamer,
}  # fmt: skip


def main(name: str, *arguments: str) -> None:
    """Make one attempt and print its answer."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected here; its core dump would fill the disk
    try:
        answer = ATTEMPTS[name](*arguments)
    except Exception as error:  # whatever a library raises is the answer
        said = error.message if isinstance(error, KeepsightError) else str(error)  # the doctor has advice of its own
        answer = {"failure": said or type(error).__name__}
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
