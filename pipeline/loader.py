"""Shards -> batches of views: reading, drawing, rendering ahead of the consumer, from any position.

Here: the loader and its counters. It is told where to stand (`seek`), never asked.
Not here: the order (order.py), the draws (records.py), the pixels (render/), the index (shards/index.py).
"""

import functools
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.order import Order, OrderMode
from wherefrom.pipeline.ranges import Range, no_range, nvtx_range
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.choose import check_device, check_renderer, check_runtime, make_renderer
from wherefrom.pipeline.render.renderer import PackingRenderer, Rendered, Renderer, render_checked
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.system import ThreadsOfProcess, single_threaded_pool
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Batch, Record, Views

log = logging.getLogger(__name__)

MAX_BAD_SHARE = 1e-4  # of the samples; at least MAX_BAD_LEAST may turn out undecodable before a run stops
MAX_BAD_LEAST = 10
DRAWN_AT_ONCE = 512  # samples of consecutive batches: to draw a few takes nearly as long
CLOSED = "the loader is closed; make another with make_loader"

_Place = tuple[int, int, int]  # epoch, step, micro-batch


class TooManyBadError(ValueError):
    """More samples would not decode than `max_bad` allows."""


@dataclass(kw_only=True, slots=True)
class LoaderStats:
    """What a loader did so far. Seconds are summed over the threads that did it; `wait_s` is the consumer's."""

    pictures: int = 0
    batches: int = 0
    replaced: int = 0  # invalid pictures that another stood in for
    invalid_views: int = 0
    read_bytes: int = 0
    pixel_bytes: int = 0
    read_s: float = 0.0
    draw_s: float = 0.0
    decode_s: float = 0.0  # 0 where the renderer can't tell it from rendering
    render_s: float = 0.0
    make_s: float = 0.0  # whole batches, from ids to views
    copy_s: float = 0.0
    wait_s: float = 0.0
    accepted: dict[str, float] = field(default_factory=dict)  # a family's share of views that kept their law without a fallback
    drawn: dict[str, int] = field(default_factory=dict)  # views behind that share


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands and what it was made from; everything a saved position must agree on.

    Which picture stands in for which follows from `dataset`, `invalid` and `decoding`. Strictly, every picture shown passed a strict
    decode, the renderer's own or the index's audit (`wherefrom index --decode`): then it does not matter whether there was an audit, nor
    when a picture was found undecodable. Leniently, a GPU's decoder decides, and the audit's verdicts belong to `invalid`.
    """

    dataset: str  # the index's fingerprint
    invalid: str  # digest of the samples that were invalid when the index was opened; if strict, without those that its audit found
    decoding: Literal["strict", "lenient"]
    renderer: str  # what served; another may go on, for its pixels differ by rounding, and it is said
    recipe: str  # the recipe's fingerprint
    seed: int
    global_batch: int
    order: str
    updates: int  # completed

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """What is known of a batch before a byte of it is read; arrays (B,)."""

    epoch: int
    ids: NDArray[np.int64]  # the order's
    sample: NDArray[np.int64]  # the pictures shown
    drawn_for: NDArray[np.int64]
    records: tuple[Record, ...]
    packed: Any  # of the records, for a renderer that takes them so; else None
    decodable: NDArray[np.bool_]


class Loader:
    """Batches of views, in an order and with draws that depend on (seed, epoch, sample, view) and the recipe alone.

    Iterating gives an epoch's micro-batches, each time the next epoch's; `forever` goes on into the next ones. Threads live until `close`,
    or until the loader is dropped. Prefetch is bounded: `prefetch` batches beside the one in the caller's hands, `prefetch_bytes`.
    """

    def __init__(
        self,
        index: ShardIndex,
        recipe: ViewRecipe,
        order: Order,
        renderer: Renderer,
        *,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        prefetch: int = 2,
        max_bad: int | None = None,
    ) -> None:
        check_runtime(threads=threads, prefetch=prefetch)
        check_literal("max_bad", max_bad, int | None)
        self.index = index
        self.recipe = recipe
        self.order = order
        self.renderer = renderer
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.max_bad = max(MAX_BAD_LEAST, int(MAX_BAD_SHARE * len(index))) if max_bad is None else max_bad
        self.updates = 0  # the position
        self.range: Range = nvtx_range if self.device.type == "cuda" else no_range  # around each stage of a batch
        self._reader = ShardReader(index) if threads != 0 else ShardReader(index, loose_threads=0)
        weakref.finalize(self, self._reader.close)  # a dropped loader leaves no file open
        self._makers = None if threads == 0 else ThreadsOfProcess(partial(single_threaded_pool, min(2, prefetch), "wherefrom-make"))
        self._stats = LoaderStats()
        self._lock = threading.Lock()
        self._bad: dict[int, str] = {}
        self._closed = False
        self._copying: deque[tuple[torch.cuda.Event, Batch]] = deque()
        if self._decoding == "lenient":
            index.warn_once(
                f"renderer {renderer.name} decodes JPEGs on the GPU, where damaged ones may be shown in part, and not all shards have "
                "decode verdicts; `wherefrom index PATTERN --decode` makes them, once"
            )

    def __len__(self) -> int:
        """Micro-batches of the next pass on this rank: of a whole epoch, or after `seek` of the rest of one."""
        return (self.updates_per_epoch - self.updates % self.updates_per_epoch) * self.order.accumulation

    def __repr__(self) -> str:
        epoch, step = divmod(self.updates, self.updates_per_epoch)
        order, where = self.order, f"{self.order.mode}, epoch {epoch}, step {step} of {self.updates_per_epoch}"
        micro_batch = order.global_batch // (order.ranks * order.accumulation)
        batch = f"B = {micro_batch} of {order.global_batch} samples, rank {order.rank} of {order.ranks}"
        views = ", ".join(f"{each.name!r} (B, {each.views}, 3, {each.size_px[0]}, {each.size_px[1]})" for each in self.recipe.families)
        served = f"{self.renderer.name} renderer, {self.device}" + (", closed" if self._closed else "")
        return f"Loader({len(self.index)} samples, {where}; {batch}; {views} {self.recipe.pixels}; {served})"

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.order.updates_per_epoch

    @property
    def prefetch_bytes(self) -> int:
        """The pixels that are made ahead, in bytes, at most."""
        pictures = -(-self.order.global_batch // (self.order.ranks * self.order.accumulation))
        values = sum(3 * family.views * family.size_px[0] * family.size_px[1] for family in self.recipe.families)
        return self.prefetch * pictures * values * getattr(torch, self.recipe.pixels).itemsize

    def seek(self, updates: int) -> None:
        """Stand after `updates` completed optimizer steps, wherever that is: nothing is read or skipped."""
        _check_updates(updates)
        self.updates = updates

    @property
    def _decoding(self) -> Literal["strict", "lenient"]:
        return "strict" if self.renderer.strict or self.index.audited else "lenient"

    def position(self, updates: int | None = None) -> dict[str, Any]:
        """Return the position after `updates` steps as plain data.

        By default it is where the next pass begins; in the middle of one give the count of steps that are done.
        Raises: ValueError if that is no whole number of at least 0.
        """
        if updates is not None:
            _check_updates(updates)
        return Position(
            dataset=self.index.fingerprint,
            invalid=self.index.invalid_digest(audit=self._decoding == "lenient"),
            decoding=self._decoding,
            renderer=self.renderer.name,
            recipe=self.recipe.fingerprint,
            seed=self.order.seed,
            global_batch=self.order.global_batch,
            order=self.order.mode,
            updates=self.updates if updates is None else updates,
        ).as_dict()

    def resume(self, position: dict[str, Any]) -> None:
        """Stand where a saved position says.

        Raises: ValueError naming the field if it is a position of another dataset, recipe, seed, batch or order, or if other pictures
                may have been left out: under another max_pixels, or by a decoder of another strictness.
        """
        if not isinstance(position, dict):
            raise ValueError(f"position={position!r}: needs the dict that `position` returned")
        here = self.position()
        mends = {
            "invalid": "the same max_pixels, and the shards audited that were",
            "decoding": "a renderer and an index that decode alike",
        }
        if self.index.audited and self.index.invalid_digest(audit=True) == self.index.invalid_digest(audit=False):
            here["decoding"] = position.get("decoding")  # every picture decodes: strict and lenient are one
        for name in here:
            if name not in position:
                raise ValueError(f"position lacks {name!r}; it was not written by this version of the library")
            if name == "renderer" and position[name] != here[name]:
                log.info("goes on with renderer %s, began with %s: pixels differ by rounding", here[name], position[name])
            elif name != "updates" and position[name] != here[name]:
                mend = mends.get(name, f"the same {name}")
                raise ValueError(f"position has {name}={position[name]!r}, this loader has {here[name]!r}; resume with {mend}")
        if not isinstance(position["updates"], int):
            raise ValueError(f"position has updates={position['updates']!r}: needs a whole number")
        self.seek(position["updates"])

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch, or after `seek` of the rest of one.

        From its first batch on the loader stands at the epoch after it: every pass is the next epoch, also where the pass before was
        broken off. Who goes on in the middle of an epoch says so by `seek`.
        """
        epoch, step = divmod(self.updates, self.updates_per_epoch)
        self.updates = (epoch + 1) * self.updates_per_epoch
        per_step = self.order.accumulation
        yield from self._stream((epoch, s, m) for s in range(step, self.updates_per_epoch) for m in range(per_step))

    def forever(self) -> Iterator[Batch]:
        """Yield micro-batches without end from the position, making ahead across epochs."""
        steps = (divmod(updates, self.updates_per_epoch) for updates in itertools.count(self.updates))
        yield from self._stream((epoch, step, m) for epoch, step in steps for m in range(self.order.accumulation))

    def batch(self, sample: ArrayLike, drawn_for: ArrayLike | None = None, epoch: int = 0) -> Batch:
        """Return the views of these pictures, with the draws of `drawn_for` (default: their own), here and now.

        Shapes: sample (B,), drawn_for (B,). Replays what a run saw; cuts a picture as another was cut.
        """
        check_literal("epoch", epoch, int)
        sample_ids = self._own_ids("sample", sample)
        drawn_for_ids = self._own_ids("drawn_for", sample if drawn_for is None else drawn_for)
        if len(drawn_for_ids) != len(sample_ids):
            raise ValueError(f"drawn_for has {len(drawn_for_ids)} ids, sample has {len(sample_ids)}; give one for every sample")
        return self._handed_over(self._make(*self._drawn([sample_ids], epoch, drawn_for_ids)))

    def _own_ids(self, name: str, values: ArrayLike) -> NDArray[np.int64]:
        """Return ids (B,) in memory of their own, which a batch keeps."""
        ids = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
        whole = ids.dtype.kind in "iu" or not ids.size  # an empty list is an array of floats
        if not whole or ids.ndim != 1 or (ids.size and not (ids.min() >= 0 and ids.max() < len(self.index))):
            raise IndexError(
                f"{name} {ids.tolist() if ids.size < 9 else ids.shape}: ids are a row of whole numbers from 0 to {len(self.index) - 1}"
            )
        return ids.astype(np.int64)

    def stats(self) -> LoaderStats:
        """Return the counters so far."""
        with self._lock:
            copy = LoaderStats(**{item.name: getattr(self._stats, item.name) for item in fields(LoaderStats)})
            copy.accepted, copy.drawn = dict(self._stats.accepted), dict(self._stats.drawn)
        return copy

    def close(self) -> None:
        """End all threads and close all files; twice is fine."""
        self._closed = True
        if self._makers is not None:
            self._makers.close()
        self.renderer.close()
        self._reader.close()
        self._copying.clear()

    def _stream(self, places: Iterator[_Place]) -> Iterator[Batch]:
        """Yield one batch a place, in order, at most `prefetch` made ahead of the one in the caller's hands."""
        process = os.getpid()
        if self._closed:
            raise ValueError(CLOSED)
        makers = None if self._makers is None else self._makers.get()
        makes = self._drawn_together(places, makers)
        if makers is None:
            for make in makes:
                yield self._timed_wait(make)
            return
        ahead: deque[Future[Batch]] = deque()
        try:
            while not self._closed:
                if process != os.getpid():
                    raise ValueError("this pass over the loader began in another process; begin one in this process")
                for make in itertools.islice(makes, self.prefetch + 1 - len(ahead)):  # the next one, and those ahead of it
                    ahead.append(makers.submit(make))
                if not ahead:
                    return
                yield self._timed_wait(ahead.popleft().result)
            raise ValueError(CLOSED)
        finally:
            for future in ahead:
                future.cancel()

    def _drawn_together(self, places: Iterator[_Place], makers: ThreadPoolExecutor | None) -> Iterator[Callable[[], Batch]]:
        """Yield what makes each place's batch. Records of several are drawn at once, by who makes the first of them."""
        micro_batch = self.order.global_batch // (self.order.ranks * self.order.accumulation)
        for epoch, of_epoch in itertools.groupby(places, key=lambda place: place[0]):
            while together := list(itertools.islice(of_epoch, -(-DRAWN_AT_ONCE // micro_batch))):
                draw = partial(self._draw_batches, epoch, together)
                # the makers' queue is first in, first out: who waits for the draws stands behind them
                drawn = functools.cache(draw) if makers is None else makers.submit(draw).result
                yield from (partial(self._make_drawn, drawn, number) for number in range(len(together)))

    def _timed_wait(self, get: Callable[[], Batch]) -> Batch:
        start = time.perf_counter()
        batch = get()
        with self._lock:
            self._stats.wait_s += time.perf_counter() - start
        return self._handed_over(batch)

    def _handed_over(self, batch: Batch) -> Batch:
        """Move a batch to the device without waiting; its pinned memory is kept until the copy is done.

        Views that were rendered on a GPU are there once the stream has come so far on which the consumer gets them.
        """
        if self.device.type != "cuda":
            return batch
        start = time.perf_counter()
        stream = torch.cuda.current_stream(self.device)  # of the loader's GPU: another may be the current one
        moved = batch.to(self.device, non_blocking=True)
        rendered_there = [views.pixels for views in batch.views if views.pixels.is_cuda]
        if rendered_there and stream != (made_on := torch.cuda.default_stream(self.device)):  # the makers' threads use no other
            stream.wait_stream(made_on)
            for pixels in rendered_there:
                pixels.record_stream(stream)  # else the allocator gives their memory away while this stream still reads it
        event = torch.cuda.Event()
        event.record(stream)
        self._copying.append((event, batch))
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()
        with self._lock:
            self._stats.copy_s += time.perf_counter() - start
        return moved

    def _draw_batches(self, epoch: int, places: Sequence[_Place]) -> list[_Drawn]:
        """Return what is known of consecutive batches of one epoch before a byte of them is read."""
        return self._drawn(self.order.micro_batches(epoch, [place[1:] for place in places]), epoch)

    def _drawn(self, batches: Sequence[NDArray[np.int64]], epoch: int, drawn_for: NDArray[np.int64] | None = None) -> list[_Drawn]:
        """Draw for the samples (B,) of each batch, with the draws of `drawn_for` (default: their own), one for every sample of all."""
        start = time.perf_counter()
        ids = np.concatenate(batches)
        drawn_for = ids if drawn_for is None else drawn_for
        sample = self.index.replacement(ids)
        with self.range("draw"):
            records = self._draw(sample, drawn_for, epoch)
            packed = self.renderer.pack(records) if isinstance(self.renderer, PackingRenderer) else None
        decodable = self.index.decodable[sample]
        ends = list(itertools.accumulate(map(len, batches)))
        rows = [slice(end - len(batch), end) for batch, end in zip(batches, ends, strict=True)]
        drawn = [
            _Drawn(
                epoch=epoch,
                ids=ids[of],
                sample=sample[of],
                drawn_for=drawn_for[of],
                records=tuple(record[of] for record in records),
                packed=None if packed is None else packed[of],
                decodable=decodable[of],
            )
            for of in rows
        ]
        with self._lock:
            self._stats.draw_s += time.perf_counter() - start
        return drawn

    def _make_drawn(self, drawn: Callable[[], list[_Drawn]], number: int) -> Batch:
        return self._make(drawn()[number])

    def _make(self, drawn: _Drawn) -> Batch:
        """Read and render a batch, drawn anew if a picture of it turned out invalid since."""
        if self._closed:
            raise ValueError(CLOSED)
        start = time.perf_counter()
        ids = drawn.ids
        sample = self.index.replacement(ids)
        if not np.array_equal(sample, drawn.sample):
            (drawn,) = self._drawn([ids], drawn.epoch, drawn.drawn_for)
            sample = drawn.sample  # another thread may have marked a picture meanwhile
        drawn_for, records = drawn.drawn_for, drawn.records
        with self.range("read"):
            encoded = self._reader.read_batch(sample)
        read = time.perf_counter()
        with self.range("render"):
            rendered = render_checked(self.renderer, self.recipe, encoded, records, drawn.decodable, drawn.packed)
        if rendered.failed:
            sample, records = self._replace_failed(rendered, ids, sample.copy(), drawn_for, drawn.epoch)
        with self.range("hand over"):
            batch = self._assemble(sample, drawn_for, rendered.pixels, records)
        with self._lock:
            stats = self._stats
            stats.pictures += len(sample)
            stats.batches += 1
            stats.replaced += int(np.count_nonzero(sample != ids))
            stats.read_bytes += sum(map(len, encoded))
            stats.pixel_bytes += sum(pixels.nbytes for pixels in rendered.pixels)
            stats.read_s += read - start
            stats.decode_s += rendered.decode_s
            stats.render_s += rendered.render_s
            stats.make_s += time.perf_counter() - start
            _count_accepted(stats, records)
        return batch

    def _replace_failed(
        self, rendered: Rendered, ids: NDArray[np.int64], sample: NDArray[np.int64], drawn_for: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], tuple[Record, ...]]:
        """Mark pictures that would not decode as invalid and render others in their place, into the same pixels, until all decode.

        Returns: the pictures shown (B,), which is `sample` changed in place, and their records.
        """
        records: tuple[Record, ...] = ()
        failed = rendered.failed
        while failed:
            where = np.fromiter(failed, np.int64)
            self._mark_invalid({int(sample[position]): reason for position, reason in failed.items()})
            sample[where] = self.index.replacement(ids[where])
            records = self._draw(sample, drawn_for, epoch)
            missing = [record[where.tolist()] for record in records]
            encoded = self._reader.read_batch(sample[where])
            again = render_checked(self.renderer, self.recipe, encoded, missing, self.index.decodable[sample[where]])
            for pixels, part in zip(rendered.pixels, again.pixels, strict=True):
                pixels[torch.from_numpy(where).to(pixels.device)] = part
            failed = {int(where[position]): reason for position, reason in again.failed.items()}
        return sample, records

    def _draw(self, sample: NDArray[np.int64], drawn_for: NDArray[np.int64], epoch: int) -> tuple[Record, ...]:
        return draw_records(
            self.recipe,
            seed=self.order.seed,
            epoch=epoch,
            drawn_for=drawn_for,
            sample=sample,
            source_size=self.index.source_size[sample],
            stored_orientation=self.index.orientation[sample],
        )

    def _assemble(
        self, sample: NDArray[np.int64], drawn_for: NDArray[np.int64], pixels: Sequence[torch.Tensor], records: Sequence[Record]
    ) -> Batch:
        return Batch(
            sample=torch.from_numpy(sample),
            drawn_for=torch.from_numpy(drawn_for),
            label=torch.from_numpy(self.index.label[sample]),
            source_size=torch.from_numpy(self.index.source_size[sample]),
            views=tuple(Views.of(record, tensor) for record, tensor in zip(records, pixels, strict=True)),
        )

    def _mark_invalid(self, bad: dict[int, str]) -> None:
        """Mark samples as invalid from now on, aloud; stop when there are too many."""
        with self._lock:
            for i, reason in bad.items():
                if i not in self._bad:
                    self._bad[i] = reason
                    self.index.mark_invalid(i, reason)
                    log.warning("sample %d (%s) will not decode and is replaced: %s", i, self.index.name(i), reason)
            if len(self._bad) > self.max_bad:
                names = ", ".join(f"{i} ({self.index.name(i)})" for i in sorted(self._bad)[:20])
                raise TooManyBadError(
                    f"{len(self._bad)} samples would not decode, max_bad={self.max_bad}: {names}; audit with wherefrom index --decode"
                )


def _count_accepted(stats: LoaderStats, records: Sequence[Record]) -> None:
    """Add a batch's views to the counters: how many there are of every family, how many kept their law, how many are not valid."""
    for record in records:
        name, views = record.geometry.family, record.accepted.numel()
        kept, valid = (int(np.count_nonzero(each.numpy())) for each in (record.accepted, record.valid))
        before = stats.drawn.get(name, 0)
        accepted = stats.accepted.get(name, 0.0) * before + kept
        stats.drawn[name], stats.accepted[name] = before + views, accepted / max(before + views, 1)
        stats.invalid_views += views - valid


def _check_updates(updates: int) -> None:
    check_literal("updates", updates, int)
    if updates < 0:
        raise ValueError(f"updates={updates}: needs 0 or more")


def make_loader(
    index: ShardIndex | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    recipe: ViewRecipe,
    *,
    seed: int = 0,
    global_batch: int = 256,
    rank: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
    order: OrderMode = "shuffled",
    renderer: str = "auto",
    threads: int | None = None,
    prefetch: int = 2,
    device: str | torch.device = "cpu",
    max_bad: int | None = None,
) -> Loader:
    """Build a loader over an index, or over the shards that a pattern, or several, name as for `ShardIndex.open`.

    global_batch: samples of one optimizer step over all ranks; each rank takes a contiguous slice, in `accumulation` micro-batches.
    order:        "shuffled", "block" (for media that want sequential reads) or "sequential" (evaluation: every sample once).
    renderer:     "auto", or a name of the table of renderers, which other packages add to (`wherefrom.renderers`).
    threads:      that decode and render; None: one a core, of those that are this rank's share where a launcher started several ranks on
                  this machine; 0: everything in the caller's thread.
    """
    for name, value, annotation in (("recipe", recipe, ViewRecipe), ("order", order, OrderMode)):
        check_literal(name, value, annotation)  # now: to build an index may take minutes
    check_renderer(renderer)
    check_runtime(threads=threads, prefetch=prefetch)
    check_device(device)
    opened = index if isinstance(index, ShardIndex) else ShardIndex.open(index)
    plan = Order(
        samples=len(opened),
        global_batch=global_batch,
        seed=seed,
        rank=rank,
        ranks=ranks,
        accumulation=accumulation,
        mode=order,
        shard_lengths=opened.block_lengths if order == "block" else (),
    )
    if order == "block" and len(plan.shard_lengths) <= plan.window:
        opened.warn_once(
            f'order="block" mixes all {len(opened)} samples at once, as "shuffled" does, for they lie in {len(plan.shard_lengths)} shards '
            f"or folders and each window is {plan.window} of these; sequential reads need more of them, `wherefrom pack` makes them"
        )
    pixel_renderer = make_renderer(recipe, renderer, device=device, threads=threads, prefetch=prefetch)
    return Loader(opened, recipe, plan, pixel_renderer, device=device, threads=threads, prefetch=prefetch, max_bad=max_bad)
