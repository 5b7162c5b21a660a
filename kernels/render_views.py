"""Views cut from decoded pictures: resize, mirror, turn, color, blur, normalize and cast, all views of a batch in one call.

Here: the public call, its checks, the choice of path; the plan by which the compiled kernel renders a batch picture by picture.
Not here: the definition (render_views_reference.py), the kernels (render_views_core.c, render_views_triton.py), decoding, drawing.
"""

import functools
import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from wherefrom.kernels.dispatch import INTEGERS, check_device, check_dtype, check_no_derivative, check_shape, choose_path, sides_of
from wherefrom.kernels.render_views_reference import Filter, render_views_reference

ViewBackend = Literal["auto", "native", "triton", "reference"]

_NATIVE = ("Plan", "instruction_sets", "open_jpeg", "decode_part", "make_pool", "close_pool")  # what is called of the compiled kernel

PIXEL_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


_FLOATS, _BOOLS = (torch.float32, torch.float64), (torch.bool,)
_RECORDS = {  # of a family: what follows (B, V) in their shapes, what they may hold, and as what the compiled kernel reads them
    "boxes": ((4,), (torch.float32,), torch.float32),
    "flipped": ((), _BOOLS, torch.bool),
    "quarter_turns": ((), INTEGERS, torch.int64),
    "matrix": ((3, 4), _FLOATS, torch.float32),
    "blur_sigma_px": ((), _FLOATS, torch.float32),
    "solarized": ((), _BOOLS, torch.bool),
}


def _check_records(records: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless the records of a family, by `_RECORDS` (B, V, ...) each, fit each other; None: there is none."""
    boxes = records["boxes"]
    assert boxes is not None
    check_shape("boxes", boxes, ("B", "V", 4), "add the view axis with boxes[:, None]")
    for name, (shape, allowed, _) in _RECORDS.items():
        tensor = records[name]
        if tensor is not None:
            check_shape(name, tensor, (*boxes.shape[:2], *shape))
            check_dtype(name, tensor, allowed)
            check_device(name, tensor, "boxes", boxes)
            check_no_derivative(name, tensor, "and rendered views give none")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ViewRequest:
    """The records of one family of views of a batch, and the tensor that the views are written into; checked on construction.

    Raises: ValueError if shapes, dtypes or devices do not fit, or one of the tensors requires a gradient: rendering has no derivatives.
    """

    boxes: Tensor  # (B, V, 4) float32 xyxy, pixels of the upright picture
    flipped: Tensor  # (B, V) bool
    quarter_turns: Tensor  # (B, V) integers, 0 to 3, counter-clockwise, after the mirror
    out: Tensor  # (B, V, 3, h, w) uint8, float16, bfloat16 or float32; planar, or channels-last in memory
    matrix: Tensor | None = None  # (B, V, 3, 4) on (r, g, b, 1) in levels 0..255
    blur_sigma_px: Tensor | None = None  # (B, V) float32, pixels of the finished view; 0: none
    solarized: Tensor | None = None  # (B, V) bool

    def __post_init__(self) -> None:
        _check_records({name: getattr(self, name) for name in _RECORDS})
        check_shape("out", self.out, (*self.boxes.shape[:2], 3, "h", "w"))
        check_dtype("out", self.out, PIXEL_DTYPES)
        check_device("out", self.out, "boxes", self.boxes)
        check_no_derivative("out", self.out, "and rendered views give none")
        if 0 in self.out.shape[3:]:
            raise ValueError(f"out has shape {tuple(self.out.shape)}: a view has at least one pixel")
        if not (self.out.is_contiguous() or self.channels_last):
            raise ValueError(f"out has strides {self.out.stride()}, expected those of a contiguous or channels-last tensor")

    @property
    def channels_last(self) -> bool:
        """Whether a pixel's channels lie together in memory."""
        return not self.out.is_contiguous() and self.out.permute(0, 1, 3, 4, 2).is_contiguous()


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """What makes a level, 0 to 255, the number that is written: level * scale + shift, by channel."""

    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    shift: tuple[float, ...] = (0.0, 0.0, 0.0)

    @staticmethod
    @functools.lru_cache  # every batch asks for the same
    def of(mean: tuple[float, ...], std: tuple[float, ...]) -> "Normalization":
        """Return that of mean and std, (3,) each, of levels / 255; raises ValueError if it is not finite."""
        means, stds = torch.tensor([mean, std], dtype=torch.float64)
        scale, shift = (1 / (255 * stds)).float().tolist(), (-means / stds).float().tolist()
        if not all(math.isfinite(number) for number in (*scale, *shift)):
            raise ValueError(f"mean={list(mean)}, std={list(std)}: needs finite numbers, std not 0")
        return Normalization(scale=tuple(scale), shift=tuple(shift))


@dataclass(frozen=True, slots=True)
class PackedViews:
    """The records of one family of views of N pictures, checked, as the compiled kernel reads them; a slice of it is that of some."""

    numbers: tuple[Any, ...]  # by `_RECORDS`, NumPy arrays (N, V, ...), contiguous, or None

    @classmethod
    def of(cls, **records: Tensor | None) -> Self:
        """Check and pack records as `ViewRequest` has them, N pictures for B; on a CPU they share memory where they are packed already.

        Raises: ValueError as `ViewRequest`.
        """
        _check_records(records)
        tensors = [(records[name], dtype) for name, (_, _, dtype) in _RECORDS.items()]
        return cls(tuple(None if tensor is None else tensor.detach().to(dtype).contiguous().numpy() for tensor, dtype in tensors))

    def __getitem__(self, rows: slice) -> "PackedViews":
        return PackedViews(tuple(None if array is None else array[rows] for array in self.numbers))


class ViewPlan:
    """A batch's records, checked and copied into the compiled kernel once; then pictures are rendered one by one, from any thread.

    A call holds the interpreter for microseconds. A picture's views of all families are made while it lies in the cache. Each call marks
    all outputs as changed, so that a backward which needs what they held before raises.
    Units:  mean and std of levels / 255.
    Raises: ValueError if a record cannot be rendered (a box that is empty, not finite or 2^20 pixels away, a blur wider than sigma 256,
            a view larger than 8192), or the kernel is not there; `instruction_set` names one of `instruction_sets()`.
    """

    def __init__(
        self,
        requests: Sequence[ViewRequest],
        *,
        orientation: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        filter: Filter = "plain",
        instruction_set: str = "auto",
    ) -> None:
        """Check and copy the records; shapes: requests as `ViewRequest`, orientation (B,), mean and std (3,)."""
        missing = native_missing()
        if missing is not None:
            raise ValueError(missing)
        pictures = len(requests[0].boxes) if requests else 0
        for request in requests:
            if len(request.boxes) != pictures or request.boxes.device.type != "cpu":
                raise ValueError(
                    f"requests hold boxes {[tuple(each.boxes.shape) for each in requests]} on {request.boxes.device}; "
                    "needs one number of pictures, on cpu"
                )
            _check_normalization(mean, std, request.out.dtype)
        if orientation is not None:
            orientation = _orientation_bytes(orientation, pictures)
        normalization = Normalization() if mean is None or std is None else Normalization.of(tuple(mean.tolist()), tuple(std.tolist()))
        self._outputs = [request.out for request in requests]
        views = [PackedViews.of(**{name: getattr(request, name) for name in _RECORDS}) for request in requests]
        self._plan = _native().Plan(
            pictures,
            None if orientation is None else orientation.numpy(),
            tuple(_family(*each, normalization, filter) for each in zip(views, self._outputs, strict=True)),
            instruction_set,
        )

    @classmethod
    def of_packed(
        cls,
        views: Sequence[PackedViews],
        outputs: Sequence[Tensor],
        *,
        orientation: Any,
        normalization: Normalization,
    ) -> Self:
        """Return the plan of records that were packed, for less: of batches of a few pictures to check them takes longer than to cut some.

        Shapes: views of B pictures, each family's output (B, V, 3, h, w), planar and contiguous, orientation (B,) an array of bytes.
        Raises: ValueError if a record cannot be rendered, or an output has not the memory of B pictures.
        """
        plan = cls.__new__(cls)
        plan._outputs = list(outputs)
        families = tuple(_family(*each, normalization, "plain") for each in zip(views, outputs, strict=True))
        plan._plan = _native().Plan(len(orientation), orientation, families, "auto")
        return plan

    def render_picture(self, position: int, picture: Any) -> None:
        """Write all views of the batch's picture number `position`: a buffer (H, W, 3) uint8 as stored, such as a NumPy array.

        Raises: IndexError if there is no such position, ValueError if the picture is of another kind or does not lie in one piece.
        """
        increment_version(self._outputs)
        self._plan.render_picture(position, picture)

    def render_jpegs(
        self, encoded: Sequence[Any], stored_size: Any, asked: Any, jpeg: Any, threads: "JpegThreads | None" = None
    ) -> tuple[list[int], float, float]:
        """Write all views of those pictures that are asked for from their JPEGs, of which no more is decoded than they read.

        Their pixels are those that the whole gives, decoded by the same library, whatever threads share them (None: the caller's alone);
        damage beyond what is read goes unseen. The interpreter is free from the first to the last picture.
        Shapes: encoded B of (bytes,), stored_size (B, 2) int32 (height, width) of pictures as stored, asked (B,) bool, contiguous arrays;
                jpeg as `open_jpeg` returns it.
        Returns: the positions whose whole is to be decoded, views undefined: the file is of another kind or size, or damaged where it was
                 read; the seconds of decoding, and of rendering, summed over threads.
        Raises: ValueError if files, sizes and what is asked for are not those of B pictures, or the threads are closed.
        """
        increment_version(self._outputs)
        return self._plan.render_jpegs(encoded, stored_size, asked, jpeg, None if threads is None else threads.pool)

    def render_all(self, pictures: Sequence[Tensor], *, threads: int = 1) -> None:
        """Write all views of all pictures, each (H, W, 3) uint8, in `threads` threads, the caller's among them."""
        increment_version(self._outputs)
        self._plan.render_all(tuple(picture.numpy() for picture in pictures), threads)


class JpegThreads:
    """Threads for `ViewPlan.render_jpegs`, without Python: made when there is work, again in a process that is forked.

    Batches come from any number of threads; they are begun in that order, and threads that find nothing left of one help with the next.
    Raises: ValueError for a number of threads below 1 or above 4096.
    """

    def __init__(self, threads: int) -> None:
        self.pool = _native().make_pool(threads)

    def close(self) -> None:
        """End the threads once the batches that they have are done; twice is fine."""
        _native().close_pool(self.pool)


def render_views(
    pictures: Sequence[Tensor],
    boxes: Tensor,
    *,
    size_px: int | tuple[int, int],
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    orientation: Tensor | None = None,
    matrix: Tensor | None = None,
    blur_sigma_px: Tensor | None = None,
    solarized: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    filter: Filter = "plain",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    out: Tensor | None = None,
    backend: ViewBackend = "auto",
    threads: int = 1,
) -> Tensor:
    """Cut, resize, mirror, turn, color, normalize and cast V views of each of B decoded pictures, as `render_views_reference` defines.

    Shapes: B pictures (H, W, 3) uint8 as stored, each contiguous, wherever it lies; boxes (B, V, 4) float32 xyxy in the upright picture,
            flipped (B, V) bool and quarter_turns (B, V) integers, None: none is; size_px (height, width) of the finished view, or one
            number for a square, orientation (B,) EXIF 1 to 8, matrix (B, V, 3, 4), blur_sigma_px and solarized (B, V), mean and std (3,)
            -> (B, V, 3, h, w), or `out`, whose dtype and memory format then hold, and which autograd then knows to be changed.
    Units:  levels 0..255 (uint8: to the nearest, ties to even) unless mean and std are given; blur_sigma_px in pixels of the view, 0: none.
    Paths:  "auto" takes the compiled kernel on a CPU and Triton on a GPU, and warns where only the reference is left. `threads` are those
            of the compiled kernel, which gives the same bits for any number of them.
    Raises: ValueError if shapes, dtypes or devices do not fit, an option is unknown, the backend cannot serve, a tensor requires a
            gradient (there are no derivatives), or, on a CPU, a record cannot be rendered (see ViewPlan).
    """
    if backend not in get_args(ViewBackend):
        raise ValueError(f"backend={backend!r}: take one of {', '.join(get_args(ViewBackend))}")
    if filter not in get_args(Filter):
        raise ValueError(f"filter={filter!r}: take one of {', '.join(get_args(Filter))}")
    if threads < 1:
        raise ValueError(f"threads={threads}: needs 1, the caller's own, or more")
    size_px = sides_of("size_px", size_px, "sides of 1 or more, (height, width), or one for a square", whole=True)
    check_shape("boxes", boxes, ("B", "V", 4), "add the view axis with boxes[:, None]")
    flipped = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device) if flipped is None else flipped
    quarter_turns = torch.zeros(boxes.shape[:2], dtype=torch.uint8, device=boxes.device) if quarter_turns is None else quarter_turns
    if out is None:
        out = _empty((*boxes.shape[:2], 3, *size_px), dtype, channels_last, boxes.device)
    check_shape("out", out, (*boxes.shape[:2], 3, *size_px))
    request = ViewRequest(
        boxes=boxes,
        flipped=flipped,
        quarter_turns=quarter_turns,
        out=out,
        matrix=matrix,
        blur_sigma_px=blur_sigma_px,
        solarized=solarized,
    )
    _check_normalization(mean, std, out.dtype)
    _check_pictures(pictures, boxes)
    path = _choose_path(backend, boxes)
    if path == "native":
        ViewPlan([request], orientation=orientation, mean=mean, std=std, filter=filter).render_all(pictures, threads=threads)
    elif path == "triton":
        _render_on_gpu(pictures, request, orientation, mean, std, filter)
    else:
        _render_by_definition(pictures, request, orientation, mean, std, filter)
    return out


def native_missing() -> str | None:
    """Return why the compiled CPU kernel is not there, or None."""
    try:
        _native()
    except ModuleNotFoundError:
        return "the CPU view kernel was not built with this wherefrom; pip install it from source with gcc 12 or clang there"
    except ImportError as error:
        return f"the CPU view kernel does not load: {error}; pip install wherefrom again"
    return None


def native_stale() -> str | None:
    """Return which part of the compiled CPU kernel, where it is there, this wherefrom calls in vain, or None."""
    lacking = [name for name in _NATIVE if not hasattr(_native(), name)]
    return f"the CPU view kernel is of an older wherefrom, it has no {lacking[0]}; pip install wherefrom again" if lacking else None


def instruction_sets() -> list[str]:
    """Return the instruction sets that the compiled kernel can use on this processor, the slowest first."""
    return _native().instruction_sets()


def open_jpeg(path: str) -> Any:
    """Return the libjpeg-turbo that is in a shared object or that it was linked with, as in Pillow's extension module, for `render_jpegs`.

    Raises: ValueError in one line if there is none that is known to the compiled kernel.
    """
    return _native().open_jpeg(path)


def decode_part(jpeg: Any, encoded: Any, stored_size: tuple[int, int], part: tuple[int, int, int, int]) -> tuple[Tensor, tuple[int, ...]]:
    """Decode what holds a part of a JPEG; within `part` the pixels are those of the whole, decoded by the same library.

    Shapes: encoded (bytes,), stored_size (height, width), part (top, left, height, width) -> (H, W, 3) uint8, and which part that is.
    Raises: ValueError in one line if the file is of another kind or size, or damaged where it was read.
    """
    pixels, decoded = _native().decode_part(jpeg, encoded, *stored_size, part)
    return torch.frombuffer(pixels, dtype=torch.uint8).view(*decoded[2:], 3), decoded


def _native() -> Any:
    return importlib.import_module("wherefrom.kernels._native")


def _choose_path(backend: ViewBackend, boxes: Tensor) -> Literal["native", "triton", "reference"]:
    """Return which path serves a call on the device of boxes, of any shape."""
    if backend == "reference":
        return "reference"
    if boxes.device.type == "cuda" or backend == "triton":
        if backend == "native":
            raise ValueError(f'pictures are on {boxes.device}, backend="native" needs cpu; use backend="auto"')
        return "triton" if choose_path(backend, boxes) == "triton" else "reference"
    missing = native_missing()
    if missing is None:
        return "native"
    if backend == "native":
        raise ValueError(missing)
    warnings.warn(f"views are rendered by the slow reference: {missing}", RuntimeWarning, stacklevel=3)
    return "reference"


def _empty(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device) -> Tensor:
    """Return an empty tensor (B, V, C, H, W), in memory (B, V, H, W, C) if channels_last."""
    if not channels_last:
        return torch.empty(shape, dtype=dtype, device=device)
    b, v, c, h, w = shape
    return torch.empty(b, v, h, w, c, dtype=dtype, device=device).permute(0, 1, 4, 2, 3)


def _check_pictures(pictures: Sequence[Tensor], boxes: Tensor) -> None:
    """Raise ValueError unless there are B pictures (H, W, 3), each in one piece, for boxes (B, V, 4)."""
    if len(pictures) != len(boxes):
        raise ValueError(f"{len(pictures)} pictures came with boxes {tuple(boxes.shape)}, expected (B, V, 4), B of each")
    for position, picture in enumerate(pictures):
        name = f"pictures[{position}]"
        check_shape(name, picture, ("H", "W", 3), "take RGB, channels last")
        check_dtype(name, picture, (torch.uint8,))
        check_device(name, picture, "boxes", boxes)
        if not picture.numel() or not picture.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(picture.shape)}, strides {picture.stride()}; pass a pixel or more, .contiguous()")


def _check_normalization(mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> None:
    """Raise ValueError unless mean and std are both (3,) or both None, and go with the dtype of the views."""
    if (mean is None) != (std is None):
        raise ValueError("one of mean and std is None: give both, or neither for levels 0..255")
    if mean is not None and dtype == torch.uint8:
        raise ValueError("mean and std came with uint8 views, which hold levels 0..255; leave them out or take a float dtype")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            check_shape(name, value, (3,))
            check_no_derivative(name, value, "and rendered views give none")


def _orientation_bytes(orientation: Tensor, pictures: int) -> Tensor:
    """Return EXIF orientations (B,) as bytes."""
    check_shape("orientation", orientation, (pictures,))
    return orientation.clamp(0, 255).to(torch.uint8)  # what no byte holds is no orientation either


def _family(packed: PackedViews, out: Tensor, normalization: Normalization, filter: Filter) -> tuple[Any, ...]:
    """Return a family as the compiled kernel reads it; out (B, V, 3, h, w), planar, or channels-last in memory."""
    channels_last = not out.is_contiguous()
    memory = out.permute(0, 1, 3, 4, 2) if channels_last else out
    return (
        out.shape[1],
        *out.shape[3:],
        str(out.dtype).removeprefix("torch."),
        channels_last,
        filter == "centered",
        *packed.numbers,
        normalization.scale,
        normalization.shift,
        memory.detach().view(-1).view(torch.uint8).numpy(),
    )


def _render_on_gpu(
    pictures: Sequence[Tensor], request: ViewRequest, orientation: Tensor | None, mean: Tensor | None, std: Tensor | None, filter: Filter
) -> None:
    """Render on the device of the pictures; shapes as `render_views`."""
    from wherefrom.kernels.render_views_triton import render_views_triton, upload

    device = request.out.device
    numbers = {
        "addresses": torch.tensor([picture.data_ptr() for picture in pictures], dtype=torch.int64),
        "sizes": torch.tensor([picture.shape[:2] for picture in pictures], dtype=torch.int32).view(-1, 2),
        "orientation": torch.ones(len(pictures), dtype=torch.uint8) if orientation is None else orientation,
    }
    numbers |= {name: value.float() for name, value in (("mean", mean), ("std", std)) if value is not None}
    on_host = [name for name, value in numbers.items() if value.device.type == "cpu"]
    numbers |= zip(on_host, upload([numbers[name] for name in on_host], device), strict=True)
    render_views_triton(
        numbers["addresses"],
        numbers["sizes"],
        orientation=numbers["orientation"],
        boxes=request.boxes,
        flipped=request.flipped,
        quarter_turns=request.quarter_turns.long(),
        matrix=None if request.matrix is None else request.matrix.float(),
        blur_sigma_px=None if request.blur_sigma_px is None else request.blur_sigma_px.float(),
        solarized=request.solarized,
        mean=numbers.get("mean"),
        std=numbers.get("std"),
        size_px=(request.out.shape[3], request.out.shape[4]),
        filter=filter,
        out=request.out,
    )
    increment_version(request.out)


def _render_by_definition(
    pictures: Sequence[Tensor], request: ViewRequest, orientation: Tensor | None, mean: Tensor | None, std: Tensor | None, filter: Filter
) -> None:
    """Render picture by picture by the definition; shapes as `render_views`."""
    for b, picture in enumerate(pictures):
        views = render_views_reference(
            picture,
            request.boxes[b],
            request.flipped[b],
            request.quarter_turns[b],
            (request.out.shape[3], request.out.shape[4]),
            orientation=1 if orientation is None else int(orientation[b]),
            matrix=None if request.matrix is None else request.matrix[b],
            blur_sigma_px=None if request.blur_sigma_px is None else request.blur_sigma_px[b],
            solarized=None if request.solarized is None else request.solarized[b],
            mean=mean,
            std=std,
            filter=filter,
        )
        request.out[b] = views.clamp(0, 255).round() if request.out.dtype == torch.uint8 else views
