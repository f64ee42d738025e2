"""Keeps requantised copies of GGUF files, made once per machine.

Some quantisations are small on disk and slow on a CPU: Q4_1 has the slowest kernels of all, and its Q8_0 or F16 copy
prefills more than twice as fast. Making one takes under a second for a small model, so a bundle ships the small file.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from keepsight.streams.errors import LLMError, MissingModelError, UsageError

__all__ = ["QUANTISATIONS", "Kind", "default_cache_dir", "quantise", "requantised"]

Kind = Literal["Q8_0", "F16"]
# llama.h: enum llama_ftype. The first two are what a bundle may ask for at load time; the others are for export.
_FTYPES: dict[str, int] = {
    "F16": 1, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_0": 2, "Q3_K_M": 12, "Q2_K": 10,
}  # fmt: skip
QUANTISATIONS = tuple(_FTYPES)
_GGUF_MAGIC = b"GGUF"


def default_cache_dir() -> Path:
    """`$KEEPSIGHT_CACHE`, else `$XDG_CACHE_HOME/keepsight`, else `~/.cache/keepsight`."""
    if own := os.environ.get("KEEPSIGHT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "keepsight"


def requantised(source: Path, *, kind: Kind, cache_dir: Path | None = None) -> Path:
    """A copy of a GGUF file in another quantisation, from the cache or made now.

    The copy is keyed by the content of `source`, `kind` and the version of llama-cpp-python, and checked before it is
    returned: a damaged one is made again. Any number of processes may ask at once: one works, the others wait.

    Args:
        source: a GGUF file of any quantisation.
        kind: F16 keeps every value of a 4-bit file to 11 bits; Q8_0 takes half the memory and rounds once more.
        cache_dir: by default `default_cache_dir()`.

    Raises:
        MissingModelError: there is no file at `source`.
        UsageError: `kind` is unknown, or the cache cannot be written.
        LLMError: `source` is not a GGUF file that llama.cpp can requantise, or the disk is full.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"Quantisation {kind!r} is unknown here.", fix=f"Use one of {', '.join(get_args(Kind))}.")
    _check_source(source)
    folder = cache_dir or default_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made_from = _digest(source, folder)
        target = folder / f"{made_from[:16]}-{kind}-llama{version('llama-cpp-python')}.gguf"
        with _locked(target.with_suffix(".lock")):
            if not _is_intact(target):
                _make(source, target, kind)
    except OSError as error:
        raise UsageError(
            f"The model cache {folder} cannot be used ({error}).", fix="Point KEEPSIGHT_CACHE at a writable directory."
        ) from error
    return target


def _check_source(source: Path) -> None:
    if not source.is_file():
        raise MissingModelError(f"There is no GGUF file at {source}.", fix="Check the path.")
    with source.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise LLMError(f"{source} is not a GGUF file.", fix="Fetch or convert it again.")


def _make(source: Path, target: Path, kind: Kind) -> None:
    """Writes beside the target first and renames, so that no reader ever meets half a file."""
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        quantise(source, partial, kind)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    _write_stamp(_stamp_path(target), target, _sha256(target))


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write `source` in another quantisation to `target`, through llama.cpp.

    Args:
        kind: one of `QUANTISATIONS`.

    Raises:
        UsageError: `kind` is unknown.
        LLMError: llama.cpp refuses the file, or the disk is full.
    """
    if kind not in _FTYPES:
        raise UsageError(f"Quantisation {kind!r} is unknown here.", fix=f"Use one of {', '.join(_FTYPES)}.")
    from keepsight.runtime.language.llama import C, last_complaint, physical_cores

    parameters = C.llama_model_quantize_default_params()
    parameters.ftype = _FTYPES[kind]
    parameters.allow_requantize = True
    parameters.nthread = physical_cores()
    code = C.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
    if code != 0:
        raise LLMError(
            f"llama.cpp cannot requantise {source} to {kind}: {last_complaint()}.",
            fix="Check that the file is complete and that the disk has room.",
        )


# Checking files without hashing hundreds of megabytes at every start: a digest is trusted as long as size and
# modification time are those it was computed for.


class _Stamp(NamedTuple):
    size: int
    mtime_ns: int
    sha256: str

    def fits(self, path: Path) -> bool:
        status = path.stat()
        return (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)


def _is_intact(target: Path) -> bool:
    """Whether the cached file is the one that was written, by its stamp; hashed again only if its times changed."""
    known = _read_stamp(_stamp_path(target))
    if known is None or not target.is_file():
        return False
    if known.fits(target):
        return True
    if target.stat().st_size != known.size or _sha256(target) != known.sha256:
        return False
    _write_stamp(_stamp_path(target), target, known.sha256)
    return True


def _digest(source: Path, folder: Path) -> str:
    """sha256 of the source, remembered in the cache by its path, size and modification time."""
    name = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]
    memory = folder / f"source-{name}.json"
    known = _read_stamp(memory)
    if known is None or not known.fits(source):
        known = _write_stamp(memory, source, _sha256(source))
    return known.sha256


def _stamp_path(target: Path) -> Path:
    return target.with_suffix(".json")


def _write_stamp(path: Path, of: Path, digest: str) -> _Stamp:
    status = of.stat()
    stamp = _Stamp(status.st_size, status.st_mtime_ns, digest)
    partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
    partial.write_text(json.dumps(stamp._asdict()))
    os.replace(partial, path)
    return stamp


def _read_stamp(path: Path) -> _Stamp | None:
    try:
        return _Stamp(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes (and threads: each call opens the file anew) until the block ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
