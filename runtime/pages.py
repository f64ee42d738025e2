"""Giving memory back to the system page by page, from arrays that stay."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy.typing as npt

__all__ = ["give_back"]

_MADV_DONTNEED = 4  # of Linux: anonymous pages are dropped, and read as zeros until they are written again


def give_back(array: npt.NDArray[Any]) -> int:
    """Let go of the memory behind an array whose content nobody needs; it reads as zeros, or keeps what it had.

    Only whole pages inside the array are dropped, so it may be a part of a larger one. Elsewhere than on Linux nothing happens.

    Args:
        array: contiguous, not a view of a file or of memory that is shared.

    Returns:
        Bytes that were given back.
    """
    if sys.platform != "linux" or not array.flags.c_contiguous:
        return 0
    page = mmap.PAGESIZE
    start = -(-array.ctypes.data // page) * page
    size = (array.ctypes.data + array.nbytes) // page * page - start
    if size <= 0 or ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED):
        return 0
    return size
