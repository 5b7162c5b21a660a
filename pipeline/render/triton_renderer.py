"""The `triton` renderer: the GPU decodes, one Triton launch a family renders every view of the batch from the decoded pictures.

Here: handing records and addresses to the kernel without waiting for it, what will not decode.
Not here: the kernel (wherefrom.kernels.render_views_triton), decoders (gpu_decode.py), drawing, reading.
On the CPU it serves tests only: pictures are decoded by decode.py and Triton's interpreter runs the kernel, slowly.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.dispatch import interpreted, triton_missing
from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.render.decoder import Decoded, Decoder
from wherefrom.pipeline.render.gpu_decode import gpu_decoder_missing, make_decoder
from wherefrom.pipeline.render.renderer import Rendered, Renderer, RendererEntry, leaves_picture, wrong_sizes
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Record

WIDEST_SIGMA_PX = 1000.0  # of a blur; the kernel cuts a radius of 4096


class TritonRenderer:
    """Renders batches on a CUDA device; its pixels equal the float64 reference's to 2e-3 levels before they are cast.

    Every view goes through the same arithmetic, whatever else is in its batch: neither the batch's size nor its order changes a bit.
    Raises: ValueError if Triton or what decodes on the GPU is missing, or for a device that is not cuda (but in Triton's interpreter the
            CPU will do).
    """

    name = "triton"

    def __init__(
        self,
        recipe: ViewRecipe,
        *,
        device: str | torch.device = "cuda",
        threads: int | None = None,
        decoder: Decoder | None = None,  # None: the best that is here
    ) -> None:
        self.device = torch.device(device)
        if missing := triton_missing():
            raise ValueError(f'renderer "triton" cannot run: {missing}; or use renderer="auto"')
        if self.device.type != "cuda" and not (self.device.type == "cpu" and interpreted()):
            raise ValueError(f'device={str(device)!r}: renderer "triton" runs on "cuda"; use renderer="torch"')
        self.recipe = recipe
        self.dtype: torch.dtype = getattr(torch, recipe.pixels)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device() if self.device.index is None else self.device.index)
        self._decoder = make_decoder(self.device, threads) if decoder is None else decoder
        self.strict = self._decoder.strict
        self._rendering: deque[tuple[torch.cuda.Event, Decoded]] = deque()  # pictures that the GPU may still read
        self._lock = threading.Lock()

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[Record]) -> Rendered:
        """Render a batch; pictures that will not decode, or whose size is not the record's, are named in `failed`.

        Shapes: B encoded files, one record (B, V, ...) a family -> one (B, V, 3, H, W) a family, on the renderer's device.
        Raises: ValueError if a record names a box outside its picture, an orientation or a blur that there is not.
        """
        for record in records:
            _check_record(record)
        pixels = tuple(
            torch.empty(len(encoded), family.views, 3, *family.size_px, dtype=self.dtype, device=self.device)
            for family in self.recipe.families
        )
        if not encoded:
            return Rendered(pixels=pixels, failed={})
        source_size, orientation = records[0].geometry.source_size.numpy(), records[0].geometry.stored_orientation
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

    def _launch(self, decoded: Decoded, orientation: Tensor, records: Sequence[Record], pixels: Sequence[Tensor]) -> None:
        """Render every family into its `pixels`; all numbers go to the device in one copy."""
        from wherefrom.kernels.render_views_triton import render_views_triton, upload

        shared = [torch.tensor(decoded.addresses), torch.from_numpy(decoded.sizes), orientation]
        shared += [torch.tensor(self.recipe.mean), torch.tensor(self.recipe.std)]
        tables = [_tables(record) for record in records]
        numbers = iter(upload([*shared, *(tensor for table in tables for tensor in table.values())], self.device))
        addresses, sizes, orientation, mean, std = (next(numbers) for _ in shared)
        normalized = self.dtype.is_floating_point
        for family, table, out in zip(self.recipe.families, tables, pixels, strict=True):
            render_views_triton(
                addresses,
                sizes,
                orientation=orientation,
                **{name: next(numbers) for name in table},
                mean=mean if normalized else None,
                std=std if normalized else None,
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


def _check_record(record: Record) -> None:
    """Raise ValueError unless every box lies in its picture, and every orientation and blur is one that there is."""
    geometry, photometric = record.geometry, record.photometric
    start, stop = geometry.boxes[..., :2], geometry.boxes[..., 2:]
    inside = ((start >= 0) & (start <= stop) & (stop <= geometry.source_size.flip(-1)[:, None])).all(-1)  # false for NaN
    if not inside.all():
        raise leaves_picture(geometry, *(~inside).nonzero()[0].tolist())
    in_exif = (geometry.stored_orientation >= 1) & (geometry.stored_orientation <= 8)
    if not in_exif.all():
        b = int((~in_exif).nonzero()[0])
        raise ValueError(f"stored_orientation of sample {geometry.sample[b]} is {geometry.stored_orientation[b]}: EXIF knows 1 to 8")
    sigma = photometric.blur_sigma_px
    blurs = (sigma >= 0) & (sigma <= WIDEST_SIGMA_PX)
    if not blurs.all():
        b, v = (~blurs).nonzero()[0].tolist()
        raise ValueError(
            f"blur_sigma_px of family {geometry.family!r}, sample {geometry.sample[b]}, view {v} is {sigma[b, v]:g}: "
            f"needs 0 to {WIDEST_SIGMA_PX:g}"
        )


def _tables(record: Record) -> dict[str, Tensor]:
    """Return one family's record as `render_views_triton` takes it, by name. Color is always there: all views, one arithmetic."""
    geometry, photometric = record.geometry, record.photometric
    return {
        "boxes": geometry.boxes,
        "flipped": geometry.flipped,
        "quarter_turns": geometry.quarter_turns,
        "matrix": color_matrix(photometric).float(),
        "blur_sigma_px": photometric.blur_sigma_px,
        "solarized": photometric.solarized,
        "blurred": photometric.blur_sigma_px.flatten().nonzero()[:, 0].int(),
    }


def _make(recipe: ViewRecipe, *, device: str | torch.device, threads: int | None, prefetch: int) -> Renderer:
    return TritonRenderer(recipe, device=device, threads=threads)


ENTRY = RendererEntry(
    devices=("cuda",),
    snaps=("pixel", "none"),
    make=_make,
    missing=lambda: triton_missing() or gpu_decoder_missing(),
    auto={"cuda": 2},  # TODO: before dali once the proof has passed with it on a GPU
    why="decodes and renders on the GPU",
)
