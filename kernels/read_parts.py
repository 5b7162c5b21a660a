"""Parts of a file on this machine, read into one stretch of memory by one call that holds the interpreter at its ends alone.

Here: the compiled module's call, where it is. Not here: files, and how they are read without it (pipeline/shards/storage.py).
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any


@functools.cache
def native_read_parts() -> Callable[[int, Any, Any], tuple[int, int, int]] | None:
    """Return what fills memory from an open file, part by part, or None where it was not built.

    It takes a descriptor, memory (bytes,) and parts (N, 3) int64, each the offset in the file, the start in memory and the bytes, and
    returns how many parts are whole; of the next, how many bytes there were, and the number of the error that its read ended with, or 0.
    It raises ValueError for a part that leaves the memory, and what a signal's handler raises.
    """
    try:
        native = importlib.import_module("wherefrom.kernels._native")
    except ImportError:
        return None
    return getattr(native, "read_parts", None)  # a compiled module of an older wherefrom has none
