"""What the calls of all kernels share: which path serves a call, and argument checks that say what came.

Here: backends and why Triton may not serve, the handle of our operator library, checks of shape, dtype and device.
Not here: any kernel; nothing of this is needed to read one's formula (*_reference.py).
"""

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "torch", "reference"]

LIBRARY = torch.library.Library("wherefrom", "FRAGMENT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of a Triton kernel as a compiler sees it without a device: what tools compile ahead of time and count."""

    name: str
    kernel: Any  # a triton.jit function
    types: dict[str, str]  # of every argument that is not a constant: "*fp32", "*bf16", "i32", "i64", "fp32"
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()  # arguments divisible by 16: every pointer that torch allocates
    warps: int = 4
    stages: int = 2
    per_step: int = 0  # activations, pixels, ... of one pass through the innermost loop; 0: nothing to count
    options: dict[str, Any] = field(default_factory=dict)


def check_backend(backend: str) -> None:
    """Raise ValueError if there is no such backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r}: take one of {', '.join(get_args(Backend))}")


def choose_path(backend: str, tensor: Tensor) -> Literal["triton", "torch"]:
    """Return which path serves a call on the device of `tensor`.

    Raises: ValueError if backend="triton" cannot serve there.
    """
    if backend == "torch" or (backend == "auto" and tensor.device.type != "cuda"):
        return "torch"
    missing = triton_missing()
    if missing is None:
        if tensor.device.type == "cuda" or interpreted():
            return "triton"
        missing = f'tensors are on {tensor.device.type}, backend="triton" needs cuda'
    if backend == "triton":
        raise ValueError(f'{missing}; use backend="auto"')
    _say_once(f"kernels take the torch path: {missing}")
    return "torch"


def triton_missing() -> str | None:
    """Return why Triton cannot serve on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreted() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launcher with a C compiler and none was found; install gcc or set CC"
    return None


def interpreted() -> bool:
    """Say whether Triton kernels run in Triton's interpreter, on tensors of any device (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _say_once(words: str) -> None:
    log.warning(words)


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str], mend: str = "") -> None:
    """Raise ValueError unless a tensor has the expected shape; a str stands for any length and is shown as the axis's letter."""
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(isinstance(want, int) and want != have for have, want in zip(shape, expected, strict=True)):
        letters = ", ".join(str(want) for want in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name} has shape {shape}, expected ({letters})" + (f"; {mend}" if mend else ""))


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless a tensor has one of the dtypes."""
    if tensor.dtype not in allowed:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {words}")


def check_device(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Raise ValueError unless two tensors lie on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {like} on {other.device}; move one of them")
