"""Named stretches of work, for whoever watches: a profiler, a timeline, nobody.

Here: what a range is, and those of NVTX. Not here: who measures them (tools/throughput/).
"""

import contextlib
from collections.abc import Callable

import torch

__all__ = ["Range", "no_range", "nvtx_range"]

Range = Callable[[str], contextlib.AbstractContextManager[None]]  # of a name: open while the work goes on, in any thread


def no_range(_: str) -> contextlib.AbstractContextManager[None]:
    """Return a range that nobody sees."""
    return contextlib.nullcontext()


def nvtx_range(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a range that NVIDIA's profilers show."""
    return torch.cuda.nvtx.range(f"wherefrom/{name}")
