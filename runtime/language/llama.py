"""llama.cpp's model and context: numpy arrays in, numpy logits out, every return code a typed error.

Built on llama-cpp-python's low-level functions, which are llama.cpp's own: its C code trusts its caller, reads past a
row that is too narrow, aborts the process on a batch that is too long and answers from NaN without a word. So all of it
is checked here, before the call. A `Llama` is not thread-safe, as the context underneath is not: `LLM` holds the lock.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from keepsight.streams.errors import LLMError, MissingComponentError, MissingModelError, UsageError

# A failed assertion in ggml would start a debugger to print a backtrace; on a board that hangs or floods the log.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
try:
    from llama_cpp import llama_cpp as C
except (ImportError, OSError, RuntimeError) as error:
    raise MissingComponentError(
        f"llama-cpp-python cannot be loaded ({error}).",
        fix="Install it with `pip install --force-reinstall llama-cpp-python==0.3.36`.",
    ) from error

__all__ = ["C", "Llama", "Perf", "last_complaint", "physical_cores"]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Integers = npt.NDArray[np.integer[Any]]

_log = logging.getLogger("keepsight.llama")
_complaints: deque[str] = deque(maxlen=3)
_LOG_LEVELS = {3: logging.WARNING, 4: logging.ERROR}  # ggml.h: GGML_LOG_LEVEL_WARN and _ERROR; INFO is chatter


@C.llama_log_callback  # type: ignore[untyped-decorator]
def _receive_log(level: int, text: bytes | None, _user_data: object) -> None:
    line = (text or b"").decode(errors="replace").strip()
    severity = _LOG_LEVELS.get(level, logging.DEBUG)
    _log.log(severity, line)
    if line and severity >= logging.WARNING:
        _complaints.append(line)


# Module-level, since llama.cpp keeps only the C pointer: a collected callback would crash the next log line.
C.llama_log_set(_receive_log, ctypes.c_void_p(0))
C.llama_backend_init()


def last_complaint() -> str:
    """The last warnings and errors that llama.cpp logged, for an error message."""
    return " / ".join(_complaints) or "it logged no reason"


def physical_cores() -> int:
    """How many physical cores this process may use, at least 1: two threads on one core only wait for each other."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


class Perf(NamedTuple):
    """llama.cpp's own count: rows of prompts, and single tokens, with the milliseconds that decoding them took."""

    prompt_ms: float
    prompt_rows: int
    token_ms: float
    tokens: int


class Llama:
    """A GGUF model with one context of several sequences that share one key-value cache.

    Args:
        path: the GGUF file.
        n_ctx: cells of the key-value cache, shared by all sequences (llama.cpp may round it up).
        n_threads: CPU threads.
        n_batch: rows a call may decode.
        n_gpu_layers: layers kept on the GPU, -1 for all.
        n_sequences: how many sequences may exist at once.

    Raises:
        MissingModelError: there is no file at `path`.
        LLMError: llama.cpp refuses the file or the settings.
    """

    def __init__(
        self, path: Path, *, n_ctx: int, n_threads: int, n_batch: int, n_gpu_layers: int, n_sequences: int
    ) -> None:
        self.path = path
        self._context: Any = None
        self._model: Any = _load_model(path, n_gpu_layers)
        try:
            self._check_kind(n_ctx)
            self._context = self._open_context(n_ctx, n_threads, n_batch, n_sequences)
        except BaseException:
            self.close()
            raise
        self._memory = C.llama_get_memory(self._context)
        self.n_threads = n_threads
        self._vocabulary = C.llama_model_get_vocab(self._model)
        self.architecture = self._metadata("general.architecture")
        self.n_embd: int = C.llama_model_n_embd_inp(self._model)
        self.n_vocab: int = C.llama_vocab_n_tokens(self._vocabulary)
        self.n_ctx: int = C.llama_n_ctx(self._context)
        self.n_batch: int = C.llama_n_batch(self._context)
        self.n_sequences: int = C.llama_n_seq_max(self._context)

    @property
    def vocabulary(self) -> Any:
        """llama.cpp's pointer to the vocabulary, which a grammar sampler needs."""
        return self._vocabulary

    def close(self) -> None:
        """Frees the context and the model; a second call does nothing."""
        if self._context is not None:
            C.llama_free(self._context)
        if self._model is not None:
            C.llama_model_free(self._model)
        self._context = self._model = None

    @property
    def closed(self) -> bool:
        """Whether `close` has run."""
        return self._model is None

    @property
    def position_bytes(self) -> int:
        """About what a position of the context takes: its keys and values of all layers, in F16."""
        width = C.llama_model_n_embd(self._model) // C.llama_model_n_head(self._model) * C.llama_model_n_head_kv(self._model)
        return int(2 * 2 * C.llama_model_n_layer(self._model) * width)

    # What may change while the model stays loaded

    def set_threads(self, count: int) -> None:
        """Computes with so many CPU threads from the next call on."""
        C.llama_set_n_threads(self._context, count, count)
        self.n_threads = count

    def resize(self, n_ctx: int) -> None:
        """Opens another, empty context over the loaded model; the memory of the old one is given back first.

        Raises:
            LLMError: the model was not trained for so many positions; there is no room, and the old context, opened again, is
                empty. If there is no room for that one either, everything is closed.
        """
        self._check_kind(n_ctx)
        before, n_batch, n_sequences = self.n_ctx, self.n_batch, self.n_sequences
        C.llama_free(self._context)
        self._context = None
        try:
            try:
                self._context = self._open_context(n_ctx, self.n_threads, n_batch, n_sequences)
            except LLMError:
                self._context = self._open_context(before, self.n_threads, n_batch, n_sequences)
                raise
        except BaseException:
            if self._context is None:
                self.close()
            raise
        finally:
            if self._context is not None:
                self._memory = C.llama_get_memory(self._context)
                self.n_ctx = C.llama_n_ctx(self._context)

    # Text

    def tokenise(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`, with nothing added around them; control tokens are recognised only if `special`."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"The text {text[:80]!r} is not valid Unicode.", fix="Send it as UTF-8.") from error
        room = len(data) + 8
        ids = (C.llama_token * room)()
        count = C.llama_tokenize(self._vocabulary, data, len(data), ids, room, False, special)
        if count < 0:
            raise LLMError(f"llama.cpp could not tokenise a text of {len(data)} bytes (code {count}).")
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for: part of a character at times, none for a control token."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = C.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def ends(self, token: int) -> bool:
        """Whether the model says with this token that it has finished."""
        return bool(C.llama_vocab_is_eog(self._vocabulary, token))

    def control_spelling(self, token: int) -> str | None:
        """How a control token is written in a template; None for any other token."""
        if not C.llama_vocab_is_control(self._vocabulary, token):
            return None
        return str(C.llama_vocab_get_text(self._vocabulary, token).decode())

    def is_control(self, token: int) -> bool:
        """Whether the token steers the model instead of standing for text."""
        return bool(C.llama_vocab_is_control(self._vocabulary, token)) or self.ends(token)

    def perf(self) -> Perf:
        """What llama.cpp itself has counted and timed since the last `perf`."""
        data = C.llama_perf_context(self._context)
        C.llama_perf_context_reset(self._context)
        # It counts batches of one row as tokens, all others as prompts, and says 1 where there were none.
        prompt_ms, token_ms = float(data.t_p_eval_ms), float(data.t_eval_ms)
        return Perf(prompt_ms, int(data.n_p_eval) if prompt_ms else 0, token_ms, int(data.n_eval) if token_ms else 0)

    # Decoding

    def decode(
        self, rows: Int32 | Float32, *, positions: Integers, sequences: Integers, outputs: npt.NDArray[np.bool_]
    ) -> Float32:
        """Decodes one batch and returns the logits asked for, copied: float32 `[outputs.sum(), n_vocab]`.

        Args:
            rows: token ids int32 `[n]`, or embeddings float32 `[n, n_embd]`; 1 <= n <= n_batch.
            positions: integers `[n]`, each the next free position of its sequence.
            sequences: integers `[n]`.
            outputs: bool `[n]`, the rows whose logits are wanted.

        Raises:
            LLMError: a row is too wide or narrow, not finite, or no known token; the cache is full; llama.cpp fails.
        """
        self._check_rows(rows)
        fed: npt.NDArray[Any] = np.ascontiguousarray(rows)
        count = len(rows)
        at, of = np.ascontiguousarray(positions, np.int32), np.ascontiguousarray(sequences, np.int32)
        flags = np.ascontiguousarray(outputs, np.int8)
        ones = np.ones(count, np.int32)
        sequence_pointers = of.ctypes.data + np.arange(count, dtype=np.uintp) * of.itemsize
        # The fields point into numpy's memory, alive until the call returns; llama_batch_free would free it.
        batch: Any = C.llama_batch()
        batch.n_tokens = count
        batch.token = _pointer(fed, C.llama_token) if fed.ndim == 1 else None
        batch.embd = _pointer(fed, ctypes.c_float) if fed.ndim == 2 else None
        batch.pos = _pointer(at, C.llama_pos)
        batch.n_seq_id = _pointer(ones, ctypes.c_int32)
        batch.seq_id = _pointer(sequence_pointers, ctypes.POINTER(C.llama_seq_id))
        batch.logits = _pointer(flags, ctypes.c_int8)
        self._check_return(C.llama_decode(self._context, batch), count)
        return self._logits(np.flatnonzero(flags))

    def copy(self, source: int, target: int) -> None:
        """Makes sequence `target` share all cells of `source`."""
        C.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def remove(self, sequence: int, start: int = 0) -> None:
        """Drops the positions of a sequence from `start` on; cells that another sequence shares stay."""
        if not C.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise LLMError(
                f"llama.cpp cannot cut sequence {sequence} at position {start}.",
                fix=f"The architecture {self.architecture!r} is unsuitable: use a plain transformer decoder.",
            )

    # Checks

    def _check_kind(self, n_ctx: int) -> None:
        model = self._model
        if C.llama_model_has_encoder(model) or C.llama_model_is_recurrent(model) or C.llama_model_is_hybrid(model):
            raise LLMError(
                f"{self.path} is no plain transformer decoder, so its state cannot branch at a prefix.",
                fix="Use a decoder-only model such as Llama, Qwen, Gemma or SmolLM.",
            )
        trained = C.llama_model_n_ctx_train(model)
        if not 0 < n_ctx <= trained:
            raise LLMError(
                f"n_ctx={n_ctx}, but {self.path} was trained for 1 to {trained} positions.", fix="Change n_ctx."
            )

    def _check_rows(self, rows: npt.NDArray[Any]) -> None:
        if not 1 <= len(rows) <= self.n_batch:
            raise LLMError(
                f"A batch of {len(rows)} rows, where 1 to {self.n_batch} fit.", fix="Raise n_batch or split it."
            )
        if rows.ndim == 1 and rows.dtype == np.int32:
            if rows.min() < 0 or rows.max() >= self.n_vocab:
                raise LLMError(
                    f"Token ids {rows.min()}..{rows.max()}, where the vocabulary has 0..{self.n_vocab - 1}.",
                    fix="Take the ids from this model's own tokeniser.",
                )
            return
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != self.n_embd:
            raise LLMError(
                f"Rows are {rows.dtype} {list(rows.shape)}, where {self.path.name} takes float32 [n, {self.n_embd}].",
                fix="Use the language model that the soft prompt was trained for.",
            )
        if not np.isfinite(rows).all():
            raise LLMError("Embedding rows hold NaN or infinity.", fix="Look for the first bad output upstream.")

    def _check_return(self, code: int, count: int) -> None:
        if code == 0:
            return
        if code == 1:
            raise LLMError(
                f"The context of {self.n_ctx} positions has no room for {count} more rows.",
                fix="Raise n_ctx, shorten the prompt, or close answers that are still open.",
            )
        reason = {2: "aborted", -1: "called the batch invalid"}.get(code, "failed")
        raise LLMError(
            f"llama_decode {reason} (code {code}, {count} rows): {last_complaint()}.", fix="Please report this."
        )

    def _logits(self, rows: npt.NDArray[np.intp]) -> Float32:
        out = np.empty((len(rows), self.n_vocab), np.float32)
        for target, row in zip(out, rows, strict=True):
            pointer = C.llama_get_logits_ith(self._context, int(row))
            if not pointer:
                raise LLMError(f"llama.cpp returned no logits for row {row} of the batch.", fix="Please report this.")
            target[:] = np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))
        if np.isnan(out).any():
            raise LLMError(
                f"{self.path.name} answered with NaN logits.",
                fix="The file is damaged or its precision overflows: convert it again.",
            )
        return out

    def _metadata(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        count = C.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if count >= 0 else ""

    def _open_context(self, n_ctx: int, n_threads: int, n_batch: int, n_sequences: int) -> Any:
        parameters = C.llama_context_default_params()
        parameters.n_ctx = n_ctx
        parameters.n_batch = n_batch
        parameters.n_ubatch = min(n_batch, 512)
        parameters.n_threads = parameters.n_threads_batch = n_threads
        parameters.n_seq_max = n_sequences
        parameters.kv_unified = True  # otherwise every sequence gets only n_ctx / n_sequences positions
        parameters.no_perf = False  # it reads a clock before and after a call, for `perf`
        parameters.swa_full = True  # otherwise cutting a sliding-window sequence silently empties it
        context = C.llama_init_from_model(self._model, parameters)
        if not context:
            raise LLMError(
                f"llama.cpp opened no context of {n_ctx} positions: {last_complaint()}.",
                fix="Lower n_ctx or free memory.",
            )
        return context


def gpu_layers() -> int:
    """How many layers of a model this build of llama.cpp can keep on a GPU: -1 for all of them, 0 for a build without one."""
    return -1 if C.llama_supports_gpu_offload() else 0


def _load_model(path: Path, n_gpu_layers: int) -> Any:
    if not path.is_file():
        raise MissingModelError(f"There is no language model at {path}.", fix="Check the path of the GGUF file.")
    if n_gpu_layers and not C.llama_supports_gpu_offload():
        raise LLMError(
            f"n_gpu_layers={n_gpu_layers}, but this llama-cpp-python was built without a GPU.",
            fix='Rebuild it with CMAKE_ARGS="-DGGML_CUDA=on", nvcc in PATH, or use n_gpu_layers=0.',
        )
    parameters = C.llama_model_default_params()
    parameters.n_gpu_layers = n_gpu_layers
    model = C.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise LLMError(
            f"llama.cpp cannot load {path}: {last_complaint()}.", fix="Fetch or convert the GGUF file again."
        )
    return model


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
