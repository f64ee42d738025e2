"""The ONNX Runtime engine refuses what does not fit, and never runs somewhere else in silence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keepsight.runtime.graphs.engine import Engine, OnnxRuntimeEngine, TensorSpec
from keepsight.streams.errors import EngineError, MissingComponentError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def save_graph(path, nodes, inputs, outputs):
    """Write an ONNX graph of nodes (operator, inputs, outputs) and of tensors name -> (element type, shape)."""

    def info(tensors):
        return [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in tensors.items()]

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(*node) for node in nodes], "test", info(inputs), info(outputs)
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8  # what the oldest supported onnxruntime reads
    onnx.save(model, path)
    return path


FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


@pytest.fixture
def ratio(tmp_path):
    """quotient = a / b, on [?, 3]; and b's own shape."""
    return save_graph(
        tmp_path / "ratio.onnx",
        [("Div", ["a", "b"], ["quotient"]), ("Shape", ["b"], ["shape"])],
        {"a": (FLOAT, ["rows", 3]), "b": (FLOAT, ["rows", 3])},
        {"quotient": (FLOAT, ["rows", 3]), "shape": (INT64, [2])},
    )


ONES = np.ones((2, 3), np.float32)


def test_runs_a_graph_by_names(ratio):
    with OnnxRuntimeEngine(ratio) as engine:
        results = engine.run({"a": 3 * ONES, "b": 2 * ONES})
    assert list(results) == ["quotient", "shape"]
    assert np.array_equal(results["quotient"], 1.5 * ONES)
    assert results["shape"].tolist() == [2, 3]


def test_describes_its_tensors_with_free_sizes_as_none(ratio):
    engine: Engine = OnnxRuntimeEngine(ratio)
    assert engine.inputs["a"] == TensorSpec("a", (None, 3), np.dtype(np.float32))
    assert engine.outputs["shape"] == TensorSpec("shape", (2,), np.dtype(np.int64))
    assert str(engine.inputs["a"]) == "float32 [?, 3]"


def test_takes_arrays_that_are_not_contiguous(ratio):
    wide = np.arange(12, dtype=np.float32).reshape(2, 6)
    results = OnnxRuntimeEngine(ratio).run({"a": wide[:, ::2], "b": ONES})
    assert np.array_equal(results["quotient"], wide[:, ::2])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"a": ONES}, r"ratio.onnx got other inputs than it has: missing \['b'\], unknown \[\]"),
        ({"a": ONES, "b": ONES, "c": ONES}, r"missing \[\], unknown \['c'\]. Its inputs are a, b."),
        ({"a": ONES, "b": ONES.astype(np.float64)}, r"input 'b' of ratio.onnx must be float32 \[\?, 3\], got float64"),
        ({"a": ONES[0], "b": ONES}, r"input 'a' .* got float32 \[3\]"),
        ({"a": ONES, "b": ONES[:, :2]}, r"input 'b' .* got float32 \[2, 2\]"),
        ({"a": ONES, "b": [[1, 2, 3]]}, "input 'b' .* got list"),
    ],
)
def test_refuses_feeds_that_do_not_fit_by_the_name_of_the_input(ratio, feeds, message):
    with pytest.raises(EngineError, match=message):
        OnnxRuntimeEngine(ratio).run(feeds)


def test_a_run_that_fails_inside_the_graph_is_an_engine_error(ratio):
    with pytest.raises(EngineError, match=r"ratio.onnx failed: .*"):
        OnnxRuntimeEngine(ratio).run({"a": np.ones((2, 3), np.float32), "b": np.ones((5, 3), np.float32)})


@pytest.mark.parametrize("numerator", [0.0, 1.0])  # 0/0 is nan, 1/0 is inf
def test_values_that_are_not_finite_are_an_error_that_names_the_output(ratio, numerator):
    divisor = ONES.copy()
    divisor[1, 2] = 0
    with pytest.raises(EngineError, match=r"output 'quotient' of ratio.onnx has 1 of 6 values that are nan or inf"):
        OnnxRuntimeEngine(ratio).run({"a": numerator * ONES, "b": divisor})


def test_a_provider_that_is_not_there_is_refused_before_anything_runs(ratio):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(EngineError, match=r"no CUDAExecutionProvider; it has .*CPUExecutionProvider"):
        OnnxRuntimeEngine(ratio, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_silent_fallback_to_another_provider_is_refused(ratio, monkeypatch):
    # What onnxruntime does when a provider is compiled in but its libraries can't be loaded.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    session = onnxruntime.InferenceSession(str(ratio), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_args, **_options: session)
    with pytest.raises(EngineError, match="asked to run on CUDAExecutionProvider and onnxruntime took CPUExecution"):
        OnnxRuntimeEngine(ratio, providers=["CUDAExecutionProvider"])


def test_no_provider_at_all_is_refused(ratio):
    with pytest.raises(EngineError, match="no unnamed provider"):
        OnnxRuntimeEngine(ratio, providers=[])


def test_a_run_that_fails_is_not_repeated_on_another_provider(ratio):
    assert not OnnxRuntimeEngine(ratio)._session._enable_fallback


def test_threads_are_set_and_do_not_spin(ratio):
    options = OnnxRuntimeEngine(ratio, threads=2)._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_file_that_is_missing_or_no_graph_is_an_engine_error(tmp_path):
    with pytest.raises(EngineError, match="there is no graph at"):
        OnnxRuntimeEngine(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(EngineError, match=r"text.onnx can't be loaded"):
        OnnxRuntimeEngine(tmp_path / "text.onnx")


def test_a_closed_engine_says_so(ratio):
    engine = OnnxRuntimeEngine(ratio)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match=r"ratio.onnx is closed"):
        engine.run({"a": ONES, "b": ONES})


def test_without_onnxruntime_the_error_names_the_package(ratio, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingComponentError, match="pip install onnxruntime"):
        OnnxRuntimeEngine(ratio)


def test_a_tensor_type_that_is_not_handled_is_named(tmp_path):
    text = onnx.TensorProto.STRING
    path = save_graph(tmp_path / "text.onnx", [("Identity", ["t"], ["u"])], {"t": (text, [1])}, {"u": (text, [1])})
    with pytest.raises(EngineError, match=r"'t' of text.onnx is a tensor\(string\)"):
        OnnxRuntimeEngine(path)


def test_an_exception_after_gstreamer_was_loaded_is_an_error_and_no_abort(tmp_path: Path) -> None:
    """GStreamer brings a second unwinder into the process; ONNX Runtime, loaded after it, must not meet it."""
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    code = (
        "from keepsight.streams.gst import load_gst; load_gst()\n"
        "from keepsight.runtime.graphs.engine import OnnxRuntimeEngine\n"
        "from keepsight.streams.errors import EngineError\n"
        "import sys\n"
        "try:\n    OnnxRuntimeEngine(sys.argv[1])\n"
        "except EngineError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "broken.onnx")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("refused:"), (done.returncode, done.stderr)
