"""Rendering on the CPU in threads: each decodes a picture into its own memory and cuts all its views while it lies in the cache.

Here: the threads, decoding, slots, the pictures that will not decode. Which code cuts is the cutter's question.
Not here: pixels (torch_cutter.py and native_cutter.py hold the cutters), drawing.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.render.renderer import Cutter, PartCutter, Rendered, Renderer, RendererMaker, view_shapes
from wherefrom.pipeline.render.slots import SlotRing
from wherefrom.pipeline.system import ThreadsOfProcess, cores_of_rank, single_threaded_pool
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRecords:
    """What is needed of records of N pictures; a slice of it is that of some."""

    stored_size: NDArray[np.int32]  # (N, 2), (height, width), EXIF not undone
    of_cutter: Any  # None: it works from records alone

    def __getitem__(self, rows: slice) -> "PackedRecords":
        of_cutter = None if self.of_cutter is None else self.of_cutter[rows]
        return PackedRecords(stored_size=self.stored_size[rows], of_cutter=of_cutter)


class ThreadedRenderer:
    """Renders in `threads` threads (None: one a core of this rank's share, 0: in the caller's); pixels land in a ring of reused slots."""

    strict = True

    def __init__(self, cutter: Cutter, *, device: str | torch.device = "cpu", threads: int | None = None, prefetch: int = 2) -> None:
        self.cutter = cutter
        self._part_cutter = cutter if isinstance(cutter, PartCutter) else None
        self.name = cutter.name
        self.recipe = cutter.recipe
        self.threads = cores_of_rank() if threads is None else threads
        self.ring = SlotRing(prefetch + 3, pinned=torch.device(device).type == "cuda")
        self._local = threading.local()
        self._pool = ThreadsOfProcess(partial(single_threaded_pool, self.threads, "wherefrom-render")) if self.threads else None
        self._jpeg_threads = self._part_cutter.jpeg_threads(self.threads) if self._part_cutter is not None and self.threads else None

    def close(self) -> None:
        """End the threads; twice is fine."""
        if self._pool is not None:
            self._pool.close()
        if self._jpeg_threads is not None:
            self._jpeg_threads.close()

    def pack(self, records: Sequence[Record]) -> PackedRecords:
        """Return what the cutter needs to know of records (N, V) of any number of pictures, worked out once."""
        sizes = _stored_sizes(records[0])
        return PackedRecords(stored_size=sizes, of_cutter=None if self._part_cutter is None else self._part_cutter.pack(records))

    def render(
        self,
        encoded: Sequence[NDArray[np.uint8]],
        records: Sequence[Record],
        decodable: NDArray[np.bool_] | None = None,
        packed: PackedRecords | None = None,
    ) -> Rendered:
        """Render a batch into a slot; undecodable pictures come back in `failed`. Those known to be decodable may be decoded in part.

        Shapes: B encoded files, one record (B, V, ...) a family, decodable (B,), None: nobody knows; packed: the B rows of what `pack`
                returned -> one (B, V, 3, H, W) a family, in the recipe's order and dtype.
        """
        pixels = self.ring.take(view_shapes(self.recipe, len(encoded)), getattr(torch, self.recipe.pixels))
        packed = self.pack(records) if packed is None else packed
        sizes = packed.stored_size
        cutter = self._part_cutter
        plan = self.cutter.plan(records, pixels) if cutter is None else cutter.plan_packed(packed.of_cutter, pixels)
        asked = decodable if decodable is not None and self.in_parts else np.zeros(len(encoded), bool)
        left, decode_s, render_s = self._cut_jpegs(plan, encoded, sizes, asked) if asked.any() else ([], 0.0, 0.0)
        whole = [*left, *np.flatnonzero(~asked).tolist()]
        untaken = iter(whole)  # threads help themselves: to hand out each would take as long as to cut it
        failed: dict[int, str] = {}

        def work() -> tuple[float, float]:
            decode_s, render_s = 0.0, 0.0
            for position in untaken:
                start = time.perf_counter()
                try:
                    stored = self._decode(encoded[position], *sizes[position].tolist())
                except DECODE_ERRORS as error:
                    failed[position] = f"{type(error).__name__}: {error}"
                    decode_s += time.perf_counter() - start
                    continue
                decoded = time.perf_counter()
                self.cutter.cut(plan, position, stored)
                decode_s, render_s = decode_s + decoded - start, render_s + time.perf_counter() - decoded
            return decode_s, render_s

        if self._pool is None:
            seconds = [work()]
        else:
            working = [self._pool.get().submit(work) for _ in range(min(self.threads, len(whole)))]
            seconds = [each.result() for each in working]
        return Rendered(
            pixels=tuple(pixels),
            failed=dict(sorted(failed.items())),
            decode_s=decode_s + sum(decode_s for decode_s, _ in seconds),
            render_s=render_s + sum(render_s for _, render_s in seconds),
        )

    def _cut_jpegs(
        self, plan: Any, encoded: Sequence[NDArray[np.uint8]], sizes: NDArray[np.int32], asked: NDArray[np.bool_]
    ) -> tuple[list[int], float, float]:
        """Write the views of JPEGs as `PartCutter.cut_jpegs`, in its own threads where there are any."""
        assert self._part_cutter is not None
        threads = (self._jpeg_threads,) if self._jpeg_threads is not None else ()
        return self._part_cutter.cut_jpegs(plan, encoded, sizes, asked, *threads)

    @property
    def in_parts(self) -> bool:
        """Whether pictures that are known to decode are decoded no further than their views read."""
        return self._part_cutter is not None and self._part_cutter.in_parts

    def _decode(self, encoded: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
        """Decode into this thread's buffer as stored; height and width are what the record says."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < height * width * 3:
            buffer = self._local.buffer = np.empty(height * width * 3, np.uint8)
        picture = decode_picture(encoded, buffer=buffer)
        if picture.shape[:2] != (height, width):
            raise ValueError(f"the header says {width} x {height} pixels, decoded are {picture.shape[1]} x {picture.shape[0]}")
        return np.ascontiguousarray(picture) if picture.flags.writeable else picture.copy()


def _stored_sizes(record: Record) -> NDArray[np.int32]:
    """Return every picture's (height, width) as stored, EXIF not undone: (B, 2)."""
    size = record.geometry.source_size.numpy().copy()
    lying = record.geometry.stored_orientation.numpy() >= 5
    size[lying] = size[lying, ::-1]
    return size


def in_threads(cutter: Callable[[ViewRecipe], Cutter]) -> RendererMaker:
    """Return what builds a renderer that cuts with these cutters in threads."""

    def make(recipe: ViewRecipe, *, device: str | torch.device, threads: int | None, prefetch: int) -> Renderer:
        return ThreadedRenderer(cutter(recipe), device=device, threads=threads, prefetch=prefetch)

    return make
