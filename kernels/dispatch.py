"""What the calls of all kernels share: which path serves a call, and argument checks that say what came.

Here: backends and why Triton may not serve, the handle of our operator library, small problems in one thread, checks of shape, dtype and
device, what derivatives ask.
Not here: any kernel; nothing of this is needed to read one's formula (*_reference.py).
"""

import contextlib
import ctypes
import functools
import importlib.util
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

log = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "torch", "reference"]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

ONE_THREAD_BELOW = 2**17  # numbers up to which a processor's problem stays in the calling thread: 1 to 2 ms of its time

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
    """Return which path serves a call on the device of `tensor`, of any shape.

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
    _warn_once(f"kernels take the torch path: {missing}")
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
def _warn_once(words: str) -> None:
    log.warning(words)


@contextlib.contextmanager
def in_one_thread(tensor: Tensor, numbers: int) -> Iterator[None]:
    """Keep a small problem, of so many numbers on the device of `tensor`, of any shape, in the calling thread, whatever others do.

    Waking OpenMP's other threads costs more than they would spare, and where another process holds their core each of PyTorch's small
    parallel regions waits for a slice of time: 30 ms in the place of 1. Both numbers set here belong to the calling thread.
    """
    if tensor.device.type != "cpu" or numbers > ONE_THREAD_BELOW:
        yield
        return
    torch.get_num_threads()  # a thread takes PyTorch's number when it first needs one: now, not over ours
    limit_mkl = _mkl_limit()
    with _openmp().limit(limits=1):
        before = limit_mkl(1)
        try:
            yield
        finally:
            limit_mkl(before)


@functools.cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


@functools.cache
def _mkl_limit() -> Callable[[int], int]:
    """Return what sets the calling thread's number of the MKL inside PyTorch, which after torch.set_num_threads heeds OpenMP no more."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # PyTorch without MKL
        return int


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str], mend: str = "") -> None:
    """Raise ValueError unless a tensor of any shape has the expected one; a str is an axis of any length, shown as its letter."""
    if tensor.shape == expected:  # all of it, most often
        return
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(isinstance(want, int) and want != have for have, want in zip(shape, expected, strict=True)):
        letters = ", ".join(str(want) for want in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name} has shape {shape}, expected ({letters})" + (f"; {mend}" if mend else ""))


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless a tensor, of any shape, has one of the dtypes."""
    if tensor.dtype not in allowed:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {words}")


def check_device(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Raise ValueError unless two tensors, of any shape, lie on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {like} on {other.device}; move one of them")


def sides_of(name: str, value: Any, words: str, *, whole: bool) -> tuple[Any, Any]:
    """Return (height, width): two numbers above 0, or one for a square.

    Raises: ValueError if the value is something else, a tensor say.
    """
    sides = tuple(value) if isinstance(value, Sequence) else (value, value)
    sides = tuple(side.item() if hasattr(side, "item") and not isinstance(side, Tensor) else side for side in sides)  # a NumPy scalar
    if len(sides) != 2 or not all(_is_side(side, whole) for side in sides):
        value_text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name}={value_text}: needs {words}")
    return sides[0], sides[1]


def _is_side(value: Any, whole: bool) -> bool:
    right_kind = isinstance(value, int) and not isinstance(value, bool) if whole else isinstance(value, int | float)
    return right_kind and 0 < value < math.inf


def contiguous_or(value: Tensor | None, unread: Tensor) -> Tensor:
    """Return a tensor, of any shape, contiguous; for None one to point at that a kernel does not read."""
    return unread if value is None else value.contiguous()


def needs_gradient(*values: Tensor | None) -> bool:
    """Say whether reverse mode follows what is made of any of these tensors, of any shape."""
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


def is_transformed(*values: Tensor | None) -> bool:
    """Say whether forward mode or a transform of torch.func is at work on tensors, of any shape.

    Neither sees into an operator that is not called by a Function.

    Raises: RuntimeError inside torch.compile if it traces a transform, as what it makes of our Functions then may have no derivative.
            Without fullgraph=True it then leaves the call to eager PyTorch, where all is right.
    """
    if torch.compiler.is_compiling():
        if transforms_active():
            raise RuntimeError("torch.compile cannot trace a transform of torch.func here; leave it to eager PyTorch")
        return False
    return transforms_active() or any(unpack_dual(value).tangent is not None for value in values if value is not None)


def transforms_active() -> bool:
    """Say whether torch.func transforms what is called: as torch.autograd.Function asks it, there is no public question."""
    return bool(torch._C._are_functorch_transforms_active())


# a transform that torch.compile traces is as constant as its code; by hand, for torch.compiler.assume_constant_result, which does no more,
# imports the compiler, and Triton with it
transforms_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_no_tangent(*values: Tensor | None) -> None:
    """Raise RuntimeError if an operator was called past its Function in forward mode, as where torch.compile gives up; any shapes."""
    if not torch._C._is_fwd_grad_enabled():  # as inside of a Function
        return
    try:
        has_tangent = any(unpack_dual(value).tangent is not None for value in values if value is not None)
    except RuntimeError:  # in forward mode, where compiled code hides whether there are tangents
        has_tangent = True
    if has_tangent:
        raise RuntimeError("an operator of wherefrom was called in forward mode by itself or by torch.compile; call it uncompiled")


def check_no_derivative(name: str, value: Tensor | None, words: str) -> None:
    """Raise ValueError if a tensor, of any shape, is to have a derivative; where torch.func hides that, `without_derivative` finds out."""
    if value is not None and (value.requires_grad or _has_tangent(value)):
        raise ValueError(f"{name} requires a gradient, {words}; pass {name}.detach()")


def _has_tangent(value: Tensor) -> bool:
    """Say whether a tensor, of any shape, is followed in forward mode, as far as can be seen here."""
    return not (torch.compiler.is_compiling() or transforms_active()) and unpack_dual(value).tangent is not None


class _WithoutDerivative(torch.autograd.Function):
    """A function of tensors that says so when asked for its derivative, instead of a silent 0."""

    @staticmethod
    def forward(words: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.words = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.words)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.words)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], words: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return one_by_one(partial(without_derivative, words, function), info.batch_size, in_dims[2:], arguments)


def without_derivative(words: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of tensors; whoever asks for its derivative gets a RuntimeError of these words."""
    return _WithoutDerivative.apply(words, function, *arguments)


def one_by_one(call: Callable[..., Any], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, Any]:
    """Serve vmap: call for each of `size` items, which lie along in_dims of the arguments, and stack -> results and their axes."""
    each = [
        call(*(value.select(axis, item) if isinstance(axis, int) else value for value, axis in zip(arguments, in_dims, strict=True)))
        for item in range(size)
    ]
    if isinstance(each[0], Tensor):
        return torch.stack(each), 0
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0,) * len(each[0])
