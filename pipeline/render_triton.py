"""The `triton` renderer: DALI decodes on the GPU, one Triton launch a family renders every view of the batch from the decoded pictures.

Here: decoding, handing records and addresses to the kernel without waiting for the GPU, what will not decode.
Not here: the kernel (wherefrom.kernels.render_views_triton), drawing, reading.
On the CPU it serves tests only: pictures are decoded by decode.py and Triton's interpreter runs the kernel, slowly.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.dispatch import interpreted, triton_missing
from wherefrom.pipeline.colour import colour_matrix
from wherefrom.pipeline.decode import decode_or_stand_in
from wherefrom.pipeline.places import available_cores
from wherefrom.pipeline.recipe import Recipe
from wherefrom.pipeline.render import Rendered
from wherefrom.pipeline.render_dali import decoded_by_dali, installed, leaves_picture, readable_files, wrong_sizes
from wherefrom.pipeline.views import Photometric, ViewGeometry

WIDEST_SIGMA_PX = 1000.0  # of a blur; the kernel cuts a radius of 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Pictures as stored (EXIF not undone), where they lie and how large they are."""

    owner: object  # of the memory: they stay where they are while it lives
    addresses: list[int]  # of contiguous (H, W, 3) uint8
    sizes: NDArray[np.int32]  # (B, 2), (height, width)
    failed: dict[int, str]  # position -> reason; one gray pixel stands in


class Decoder(Protocol):
    """Encoded files in, decoded pictures out."""

    strict: bool  # whether a damaged picture is always refused

    def decode(self, encoded: Sequence[NDArray[np.uint8]]) -> Decoded:
        """Decode a batch of at least one file."""
        ...

    def close(self) -> None:
        """Free threads and memory; twice is fine."""
        ...


class TritonRenderer:
    """Renders batches on a CUDA device; its pixels equal the float64 reference's to 2e-3 levels before they are cast.

    Every view goes through the same arithmetic, whatever else is in its batch: neither the batch's size nor its order changes a bit.
    Raises: ValueError if Triton or DALI is missing, or for a device that is not cuda (but in Triton's interpreter the CPU will do).
    """

    name = "triton"

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: str | torch.device = "cuda",
        threads: int | None = None,
        hw_decoder_load: float = 0.65,  # share of JPEGs that a GPU's hardware decoder takes, where it has one
    ) -> None:
        self.device = torch.device(device)
        if missing := triton_missing():
            raise ValueError(f'renderer "triton" cannot run: {missing}; or use renderer="dali"')
        if self.device.type != "cuda" and not (self.device.type == "cpu" and interpreted()):
            raise ValueError(f'device={str(device)!r}: renderer "triton" runs on "cuda"; use renderer="torch"')
        self.recipe = recipe
        self.dtype: torch.dtype = getattr(torch, recipe.pixels)
        self._decoder: Decoder
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device() if self.device.index is None else self.device.index)
            self._decoder = DaliDecoder(device=self.device, threads=threads, hw_decoder_load=hw_decoder_load)
        else:
            self._decoder = StockDecoder()
        self.strict = self._decoder.strict
        self._rendering: deque[tuple[torch.cuda.Event, Decoded]] = deque()  # pictures that the GPU may still read
        self._lock = threading.Lock()

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[tuple[ViewGeometry, Photometric]]) -> Rendered:
        """Render a batch; pictures that will not decode, or whose size is not the record's, are named in `failed`.

        Shapes: B encoded files, one record (B, V, ...) a family -> one (B, V, 3, H, W) a family, on the renderer's device.
        Raises: ValueError if a record names a box outside its picture, an orientation or a blur that there is not.
        """
        for record in records:
            _check_record(*record)
        pixels = tuple(
            torch.empty(len(encoded), family.views, 3, *family.size_px, dtype=self.dtype, device=self.device)
            for family in self.recipe.families
        )
        if not encoded:
            return Rendered(pixels=pixels, failed={})
        source_size, orientation = records[0][0].source_size.numpy(), records[0][0].stored_orientation
        with self._lock:
            started = time.perf_counter()
            decoded = self._decoder.decode(encoded)
            decoded_s = time.perf_counter()
            self._launch(decoded, orientation, records, pixels)
            self._keep_until_rendered(decoded)
            rendered_s = time.perf_counter()
        lying = orientation.numpy() >= 5
        upright_size = np.where(lying[:, None], decoded.sizes[:, ::-1], decoded.sizes)
        failed = wrong_sizes(upright_size, source_size) | decoded.failed
        return Rendered(pixels=pixels, failed=failed, decode_s=decoded_s - started, render_s=rendered_s - decoded_s)

    def close(self) -> None:
        """Free threads and memory; twice is fine."""
        with self._lock:
            while self._rendering:
                self._rendering.popleft()[0].synchronize()
            self._decoder.close()

    def _launch(
        self, decoded: Decoded, orientation: Tensor, records: Sequence[tuple[ViewGeometry, Photometric]], pixels: Sequence[Tensor]
    ) -> None:
        """Render every family into its `pixels`; all numbers go to the device in one copy."""
        from wherefrom.kernels.render_views_triton import render_views_triton

        shared = [torch.tensor(decoded.addresses), torch.from_numpy(decoded.sizes), orientation]
        shared += [torch.tensor(self.recipe.mean), torch.tensor(self.recipe.std)]
        tables = [_tables(*record) for record in records]
        moved = iter(_moved_together([*shared, *(tensor for table in tables for tensor in table.values())], self.device))
        addresses, sizes, orientation, mean, std = (next(moved) for _ in shared)
        normalised = self.dtype.is_floating_point
        for family, table, out in zip(self.recipe.families, tables, pixels, strict=True):
            render_views_triton(
                addresses,
                sizes,
                orientation=orientation,
                **{name: next(moved) for name in table},
                mean=mean if normalised else None,
                std=std if normalised else None,
                size_px=family.size_px,
                filter="plain",
                out=out,
            )

    def _keep_until_rendered(self, decoded: Decoded) -> None:
        """Hold a batch's pictures until the GPU has read them, and let go of those that it has."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._rendering.append((event, decoded))
        while self._rendering and self._rendering[0][0].query():
            self._rendering.popleft()


class DaliDecoder:
    """Decodes JPEGs with NVIDIA DALI, to the GPU or, for tests, to the CPU; pictures keep their stored orientation.

    Raises: ValueError if DALI is not installed.
    """

    strict = False

    def __init__(self, *, device: torch.device, threads: int | None = None, hw_decoder_load: float = 0.65) -> None:
        if not installed():
            raise ValueError(
                'renderer "triton" needs NVIDIA DALI to decode, not installed here; pip install nvidia-dali-cuda130, '
                'or use renderer="torch"'
            )
        self.device = device
        self.threads = available_cores() if threads is None else max(1, threads)
        self.hw_decoder_load = hw_decoder_load
        self._max_batch = 1
        self._pipeline: Any = None  # built on first use, again when a batch is larger, or after a failure
        self._pool: ThreadPoolExecutor | None = None  # decodes what is no JPEG

    def decode(self, encoded: Sequence[NDArray[np.uint8]]) -> Decoded:
        """Decode a batch; on a GPU the pictures are there once its current stream has come so far.

        Raises: RuntimeError if DALI fails although every picture decodes.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "wherefrom-decode")
        files, failed = readable_files(encoded, self._pool, decode_jpegs=False)
        try:
            pictures = self._run(files)
        except RuntimeError:
            self._pipeline = None  # one undecodable picture ends a DALI pipeline
            files, failed = readable_files(encoded, self._pool, decode_jpegs=True)
            pictures = self._run(files)
        return Decoded(
            owner=pictures,
            addresses=[pictures[i].data_ptr() for i in range(len(encoded))],
            sizes=np.array([shape[:2] for shape in pictures.shape()], np.int32),
            failed=failed,
        )

    def close(self) -> None:
        """Free threads and memory; twice is fine."""
        self._pipeline = None
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def _run(self, encoded: Sequence[NDArray[np.uint8]]) -> Any:
        """Return the decoded pictures, a list of DALI's."""
        if self._pipeline is None or len(encoded) > self._max_batch:
            self._max_batch = max(len(encoded), self._max_batch)
            self._pipeline = self._build()
        self._pipeline.feed_input("encoded", list(encoded))
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return self._pipeline.run(stream)[0]

    def _build(self) -> Any:
        from nvidia.dali import pipeline_def

        @pipeline_def(batch_size=self._max_batch, num_threads=self.threads, device_id=self.device.index, prefetch_queue_depth=1)
        def graph() -> Any:
            return decoded_by_dali("encoded", self.device.type == "cuda", self.hw_decoder_load)

        pipeline = graph()
        pipeline.build()
        return pipeline


class StockDecoder:
    """Decodes as the torch renderer does, in the caller's thread."""

    strict = True

    def decode(self, encoded: Sequence[NDArray[np.uint8]]) -> Decoded:
        """Decode a batch on the CPU."""
        pictures, reasons = zip(*map(decode_or_stand_in, encoded), strict=True)
        return Decoded(
            owner=pictures,
            addresses=[picture.ctypes.data for picture in pictures],
            sizes=np.array([picture.shape[:2] for picture in pictures], np.int32),
            failed={i: reason for i, reason in enumerate(reasons) if reason},
        )

    def close(self) -> None:
        """Nothing is held."""


def _check_record(geometry: ViewGeometry, photometric: Photometric) -> None:
    """Raise ValueError unless every box lies in its picture, and every orientation and blur is one that there is."""
    start, stop = geometry.boxes[..., :2], geometry.boxes[..., 2:]
    inside = ((start >= 0) & (start <= stop) & (stop <= geometry.source_size.flip(-1)[:, None])).all(-1)  # false for NaN
    if not inside.all():
        raise leaves_picture(geometry, *(~inside).nonzero()[0].tolist())
    known = (geometry.stored_orientation >= 1) & (geometry.stored_orientation <= 8)
    if not known.all():
        b = int((~known).nonzero()[0])
        raise ValueError(f"stored_orientation of sample {geometry.sample[b]} is {geometry.stored_orientation[b]}: EXIF knows 1 to 8")
    sigma = photometric.blur_sigma_px
    blurs = (sigma >= 0) & (sigma <= WIDEST_SIGMA_PX)
    if not blurs.all():
        b, v = (~blurs).nonzero()[0].tolist()
        raise ValueError(
            f"blur_sigma_px of family {geometry.family!r}, sample {geometry.sample[b]}, view {v} is {sigma[b, v]:g}: "
            f"needs 0 to {WIDEST_SIGMA_PX:g}"
        )


def _tables(geometry: ViewGeometry, photometric: Photometric) -> dict[str, Tensor]:
    """Return one family's record as `render_views_triton` takes it, by name. Colour is always there: all views, one arithmetic."""
    return {
        "boxes": geometry.boxes,
        "flipped": geometry.flipped,
        "quarter_turns": geometry.quarter_turns,
        "matrix": colour_matrix(photometric).float(),
        "blur_sigma_px": photometric.blur_sigma_px,
        "solarised": photometric.solarised,
        "blurred": photometric.blur_sigma_px.flatten().nonzero()[:, 0].int(),
    }


def _moved_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return small CPU tensors on a device: one copy out of pinned memory, for which nobody waits."""
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.nbytes // 16) * 16
    packed = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, start in zip(tensors, starts, strict=True):
        packed[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    moved = packed.to(device, non_blocking=True)
    return [
        moved[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, start in zip(tensors, starts, strict=True)
    ]
