"""Measures a run's stages alone and together on this machine, and makes the chain of them that is judged.

Here: rounds of short measurements, interleaved, with the library's own loader and trainer; what each costs; which changes to predict.
Not here: the verdict (train/throughput.py), how it looks (report.py, page.py).
CPU-seconds are of this process: they hardly move when others use the machine; rates go by the clock.
"""

import hashlib
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.loader import Loader, make_loader
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.choose import RENDERERS, make_renderer, renderer_entry
from wherefrom.pipeline.render.renderer import RenderDevice, Renderer, render_checked
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.system import available_cores, cores_of_rank, local_world_size
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Batch, Record
from wherefrom.tools.system_limits import read_memory
from wherefrom.tools.throughput.watching import StageSeconds, Stretch, Timeline, labeled
from wherefrom.train import run_folder
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.throughput import (
    PARALLEL_FRAC,
    RATED_TFLOPS,
    Chain,
    Change,
    Verdict,
    batch_change,
    calibrated,
    disk_change,
    gpu_changes,
    judge,
    log_change,
    machine_changes,
    one_math_thread_change,
    order_change,
    packing_change,
    picture_size_change,
    renderer_changes,
    thread_changes,
    views_change,
)
from wherefrom.train.trainer import Trainer

ROUNDS = 3
UPDATE_S = 1.5  # of an update, or of making its batch, at most: larger batches are measured by smaller ones
FEW = 2  # pictures of the smallest batch
STAGE_PICTURES = (4, 32)  # of one measurement of a stage, as many as there is time for
SMALL_SIDE_PX = 256
PROBE_S = 0.25
READ_BATCH = 16
RESERVED = 0.5  # of the free memory, in which files stay that are read again and again
LARGEST_SAVED = 100_000_000  # parameters, above which a checkpoint is not written for its time


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The median of several measurements, the least and the largest."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), n=len(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """Rates of whole parts, pictures/s by the clock."""

    ceiling: Spread  # training on one batch again and again
    reached: Spread  # training with data; with lines of the log and checkpoints, as long as they took alone
    waiting_frac: float  # of the time with data
    loader: dict[int, Spread]  # the loader alone, by its threads
    updates: int  # with data, in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """All that was measured, and the verdict."""

    facts: dict[str, Any]
    stages: dict[str, Spread]  # milliseconds a picture, by stage
    together: Together
    chain: Chain
    verdict: Verdict
    timeline: list[Stretch]

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data for JSON; rates of infinity are None."""
        return _plain(asdict(self))


class Profiler:
    """A trainer of a run's settings with a loader of small batches, measured part by part.

    seconds: about how long all of it may take, on a machine that is not slower than its first updates.
    """

    def __init__(self, trainer: Trainer, *, seconds: float, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.settings, self.ranks = trainer.settings, trainer.ranks
        self.index: ShardIndex = trainer.loader.index
        self.recipe: ViewRecipe = trainer.loader.recipe
        self.device = trainer.accelerator.device
        self.cores, self.ranks_here = available_cores(), local_world_size()
        threads = self.settings.runtime.threads
        self.threads = cores_of_rank() if threads is None else threads
        self.seconds, self.slice_s = seconds, seconds / 40  # of one measurement; a round is made of about eight
        self.of_rank = self.settings.global_batch // self.ranks.count // self.settings.runtime.accumulation
        self._by_size = np.argsort(self.index.length, kind="stable").astype(np.int64)
        self.rng = np.random.default_rng(self.settings.seed)
        self.batch = self._affordable_batch()
        self.update_s = self._timed_update(self._make_batch(self.batch))  # ranks make equally many, or would wait for each other for ever
        self.stage_pictures = self._affordable_pictures()

    def measure(self, trace: Path | None = None) -> Profile:
        """Measure all of it and judge; trace: where a Chrome trace of some updates with data goes."""
        with ExitStack() as stack:
            stack.callback(setattr, self.trainer, "batches", None)
            stages: dict[str, list[float]] = {}
            ceilings: list[tuple[float, float]] = []  # pictures/s, CPU-seconds a second
            reached, waited = [], []
            probed, used = [], []  # cores that we get where we want all, and CPU-seconds a second of training
            loaders: dict[int, list[float]] = {self.threads: []}
            updates = 0
            log_s = self._log_s()
            one, began = self._make_batch(self.batch), time.perf_counter()
            for number in range(ROUNDS):
                if number and self._highest(time.perf_counter() - began) * (1 + 1 / number) > self.seconds:
                    break  # one more would take too long
                probed.append(self._free_cores())
                for name, seconds in self._stages_of_loader(number).items():
                    stages.setdefault(name, []).append(seconds)
                of_update, rate, cpu_rate = self._train_on(one)
                for name, seconds in of_update.items():
                    stages.setdefault(name, []).append(seconds)
                ceilings.append((rate, cpu_rate))
                used.append(cpu_rate)
                loader_rate = self._loader_rate(self.threads)
                loaders[self.threads].append(loader_rate)
                rate, waiting, cpu_rate, count = self._train_with_data(loader_rate)
                reached.append(1 / (1 / rate + log_s / (self.of_rank * self.settings.runtime.accumulation)))
                waited.append(waiting)
                used.append(cpu_rate)
                updates += count
                probed.append(self._free_cores())
            for threads in sorted({1, 2 * self.threads} - {self.threads}):
                loaders[threads] = [self._loader_rate(threads)]
            timeline = self._timeline()
            if trace is not None:
                self._trace(trace)
            together = Together(
                ceiling=Spread.of([rate for rate, _ in ceilings]),
                reached=Spread.of(reached),
                waiting_frac=statistics.median(waited),
                loader={threads: Spread.of(rates) for threads, rates in sorted(loaders.items())},
                updates=updates,
            )
            spreads = {name: Spread.of([1000 * value for value in values]) for name, values in stages.items()}
            free = max(
                statistics.median(probed), *(self.ranks_here * cores for cores in used)
            )  # a probe is short: what training had was there
            medians = {name: statistics.median(values) for name, values in stages.items()}
            chain = calibrated(self._chain(medians, ceilings, free, log_s), together.reached.median)
            verdict = judge(chain, self._changes(chain, stages), reached=together.reached.median)
        facts = self._facts(free)
        return Profile(facts=facts, stages=spreads, together=together, chain=chain, verdict=verdict, timeline=timeline)

    def _affordable_batch(self) -> int:
        """Return how many pictures an update is made of here: those of the run, or as many as do not take too long."""
        few = min(FEW, self.of_rank)
        self._make_batch(few)  # the first one warms up
        start = time.perf_counter()
        batch = self._make_batch(few)
        made_s = self._highest(time.perf_counter() - start)
        update_s = self._timed_update(batch) / self.settings.runtime.accumulation
        affordable = int(UPDATE_S * few / max(made_s, update_s))
        return min(self.of_rank, max(few, affordable))

    def _free_cores(self) -> float:
        """Return how many cores the ranks on this machine get where they want all of ours, each its part."""
        self.ranks.wait()
        return _cores_got(cores_of_rank()) * self.ranks_here

    def _timed_update(self, batch: Batch) -> float:
        """Return the seconds of the second of two updates on a batch, on the slowest rank."""
        for _ in range(2):
            start = time.perf_counter()
            self._update(itertools.repeat(batch))
            self._synchronize()
            seconds = time.perf_counter() - start
        self.trainer.window.take()
        return self._highest(seconds)

    def _highest(self, seconds: float) -> float:
        """Return the most of what the ranks say: what they decide by it they decide alike."""
        return self.ranks.highest(math.ceil(1e9 * seconds)) / 1e9

    def _affordable_pictures(self) -> int:
        """Return of how many pictures the stages of the loader are measured."""
        least, most = STAGE_PICTURES
        sample = self.index.replacement(self._some_ids(least))
        self._forget(sample)
        with ShardReader(self.index) as reader:
            read_s, _ = _read(reader, sample)
        return min(len(self.index), most, max(least, int(self.slice_s / read_s)))

    def _make_batch(self, pictures: int) -> Batch:
        return self.trainer.loader.batch(self._some_ids(pictures))

    def _some_ids(self, count: int) -> NDArray[np.int64]:
        """Return samples of small and large files as all pictures have them: one of each of `count` equal parts of their order by size."""
        parts = (np.arange(count) + self.rng.random(count)) / count
        return self.rng.permutation(self._by_size[(parts * len(self.index)).astype(np.int64)])

    def _update(self, batches: Iterator[Batch]) -> None:
        """Make an update; the run's schedule begins again where it would end, and nothing is kept."""
        self.trainer.batches = batches
        if self.trainer.done + 1 >= self.trainer.updates:
            self.trainer.done = 0
        self.trainer.update()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # training

    def _train_on(self, batch: Batch) -> tuple[dict[str, float], float, float]:
        """Train on one batch again and again; return seconds a picture by stage, pictures/s, CPU-seconds a second."""
        watch, before = StageSeconds(self.device), self.trainer.range
        self.trainer.range = watch
        count, start, cpu_start = max(2, round(2 * self.slice_s / self.update_s)), time.perf_counter(), time.process_time()
        for _ in range(count):
            self._update(itertools.repeat(batch))
        self._synchronize()
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        self.trainer.range = before
        self.trainer.window.take()
        pictures = count * self._pictures(batch)
        of_stages = watch.take()
        of_stages.pop("wait", None)
        if self.device.type == "cpu":  # what no range holds is of the optimizer's side
            of_stages["optimizer"] = of_stages.get("optimizer", 0.0) + max(cpu_s - sum(of_stages.values()), 0.0)
        else:
            of_stages |= {"host": cpu_s, "copy": self._copy_s(batch) * count}
        if self.ranks.count > 1:
            of_stages["collectives"] = of_stages.get("collectives", 0.0) + self._all_reduce_s() * count
        return {name: value / pictures for name, value in of_stages.items()}, pictures / seconds, cpu_s / seconds

    def _on_one_thread(self) -> float:
        """Return the CPU-seconds a picture of training in one thread."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            of_update, _, _ = self._train_on(self._make_batch(self.batch))
        finally:
            torch.set_num_threads(before)
        return sum(of_update.values())

    def _pictures(self, batch: Batch) -> int:
        return len(batch) * self.settings.runtime.accumulation

    def _train_with_data(self, loader_rate: float) -> tuple[float, float, float, int]:
        """Train with the loader, which alone has made so many pictures/s.

        Returns: pictures/s, the share of time that waited for data, CPU-seconds a second, and updates.
        """
        update_s = self._highest(self.update_s + self.batch * self.settings.runtime.accumulation / loader_rate)  # at most
        count = max(3, round(4 * self.slice_s / update_s))
        with closing(self._loader(self.threads)) as loader:
            batches = loader.forever()
            for _ in range(2):
                self._update(batches)
            self._synchronize()
            waited_before = self.trainer.clock.seconds["waiting"]
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(count):
                self._update(batches)
            self._synchronize()
            seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
            waited = self.trainer.clock.seconds["waiting"] - waited_before
        self.trainer.window.take()
        return count * self.batch * self.settings.runtime.accumulation / seconds, waited / seconds, cpu_s / seconds, count

    def _copy_s(self, batch: Batch) -> float:
        """Return the seconds that a batch takes to the GPU from pinned memory."""
        size = sum(views.pixels.nbytes for views in batch.views)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        pinned.to(self.device, non_blocking=True)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _all_reduce_s(self) -> float:
        """Return the seconds that the sum of all gradients over the ranks takes, with nothing to hide it."""
        size = sum(parameter.numel() for parameter in self.trainer.step.parameters() if parameter.requires_grad)
        gradients = torch.zeros(size, device=self.device)
        dist.all_reduce(gradients)
        self._synchronize()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        self._synchronize()
        return time.perf_counter() - start

    # the loader

    def _loader(self, threads: int) -> Loader:
        return make_loader(
            self.index,
            self.recipe,
            seed=self.settings.seed,
            global_batch=self.batch * self.ranks.count,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            order=self.settings.order,
            renderer=self.settings.runtime.renderer,
            threads=threads,
            prefetch=self.settings.runtime.prefetch,
            device=self.device,
        )

    def _loader_rate(self, threads: int) -> float:
        """Return the pictures/s of the loader alone, after its first batches."""
        with closing(self._loader(threads)) as loader:
            batches = loader.forever()
            for _ in range(self.settings.runtime.prefetch + 1):
                next(batches)
            count, start = 0, time.perf_counter()
            while count < 2 or time.perf_counter() - start < self.slice_s:
                next(batches)
                count += 1
            return count * self.batch / (time.perf_counter() - start)

    def _stages_of_loader(self, number: int) -> dict[str, float]:
        """Return seconds a picture of each stage of the loader, alone and in one thread: by the clock of reading, else CPU-seconds."""
        count = self.stage_pictures
        sample = self.index.replacement(self._some_ids(count))
        first = int(self.rng.integers(0, len(self.index) - count + 1))
        in_order = np.arange(first, first + count, dtype=np.int64)
        seconds: dict[str, float] = {}
        with ShardReader(self.index) as reader:
            self._forget(sample)
            small, large = np.array_split(sample[np.argsort(self.index.length[sample])], 2)
            small_s, large_s = (_read(reader, half)[0] for half in (small, large))
            seconds["read, cold"] = (small_s * len(small) + large_s * len(large)) / count
            seconds["read, by the byte"] = self._by_the_byte(small, large, small_s, large_s)
            self._forget(in_order)
            seconds["read in order, cold"], _ = _read(reader, in_order)
            seconds["read"], seconds["read, CPU"] = _read(reader, sample)
            encoded = reader.read_batch(sample)
        records, seconds["draw"] = self._draw(sample, number)
        seconds["decode alone"] = _decode_alone(encoded)
        with closing(make_renderer(self.recipe, self.settings.runtime.renderer, device=self.device, threads=0)) as renderer:
            seconds["decode"], seconds["render"] = self._render(renderer, sample, encoded, records)
        with closing(self._loader(0)) as loader:
            start = time.process_time()
            loader.batch(sample, epoch=number)
            whole = (time.process_time() - start) / count
        parts = sum(seconds[name] for name in ("read, CPU", "draw", "decode", "render"))
        seconds["hand over"] = max(whole - parts, 0.0)
        return seconds

    def _by_the_byte(self, small: NDArray[np.int64], large: NDArray[np.int64], small_s: float, large_s: float) -> float:
        """Return how long the bytes of a picture of mean size take to be read, as small and large ones tell; seconds a picture each."""
        small_bytes, large_bytes = (float(self.index.length[ids].mean()) for ids in (small, large))
        if large_bytes - small_bytes < 0.2 * large_bytes:
            return small_s  # too alike to tell
        by_byte_s = max(large_s - small_s, 0.0) / (large_bytes - small_bytes)
        return by_byte_s * (small_bytes + large_bytes) / 2

    def _forget(self, samples: NDArray[np.int64]) -> None:
        """Ask the system to drop what it keeps in memory of these pictures' files; where it cannot, reading is warm."""
        if not hasattr(os, "posix_fadvise"):
            return
        for sample in samples.tolist():
            path, offset, length = self.index.location(sample)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                return  # not a file of this machine
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def _draw(self, sample: NDArray[np.int64], epoch: int) -> tuple[tuple[Record, ...], float]:
        start = time.process_time()
        records = draw_records(
            self.recipe,
            seed=self.settings.seed,
            epoch=epoch,
            drawn_for=sample,
            sample=sample,
            source_size=self.index.source_size[sample],
            stored_orientation=self.index.orientation[sample],
        )
        return records, (time.process_time() - start) / len(sample)

    def _render(
        self, renderer: Renderer, sample: NDArray[np.int64], encoded: Sequence[NDArray[np.uint8]], records: Sequence[Record]
    ) -> tuple[float, float]:
        """Return the CPU-seconds a picture of decoding and of rendering; all of it rendering where the renderer cannot tell."""
        start = time.process_time()
        rendered = render_checked(renderer, self.recipe, encoded, records, self.index.decodable[sample])
        self._synchronize()
        seconds = (time.process_time() - start) / len(sample)
        clock_s = rendered.decode_s + rendered.render_s
        decode_s = seconds * rendered.decode_s / clock_s if clock_s else 0.0
        return decode_s, seconds - decode_s

    # what follows

    def _timeline(self) -> list[Stretch]:
        """Return when which thread did what in some updates with data."""
        watch, before = Timeline(), self.trainer.range
        with closing(self._loader(self.threads)) as loader:
            loader.range = self.trainer.range = watch
            batches = loader.forever()
            for _ in range(5):
                with watch("update"):
                    self._update(batches)
                    self._synchronize()
        self.trainer.range = before
        self.trainer.window.take()
        return watch.stretches

    def _trace(self, path: Path) -> None:
        """Write a Chrome trace of some updates with data, of the first rank's alone, whole or not at all."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
        before = self.trainer.range
        with closing(self._loader(self.threads)) as loader:
            loader.range = self.trainer.range = labeled
            batches = loader.forever()
            self._update(batches)
            every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            with torch.profiler.profile(activities=activities, experimental_config=every_thread) as profiler:
                for _ in range(3):
                    self._update(batches)
                self._synchronize()
        self.trainer.range = before
        self.trainer.window.take()
        if not self.ranks.first:
            return
        with write_aside(path) as aside:
            profiler.export_chrome_trace(str(aside))

    def _chain(self, stages: Mapping[str, float], ceilings: Sequence[tuple[float, float]], free: float, log_s: float) -> Chain:
        """Return the chain of the medians of all stages, seconds a picture; free: cores that others leave; log_s: an update's."""
        of_update = self.of_rank * self.settings.runtime.accumulation
        here: RenderDevice = "cuda" if self.device.type == "cuda" else "cpu"
        cores = float(max(1, self.cores))
        free = min(free, cores)
        parallel = PARALLEL_FRAC
        if free > 1.2 and here == "cpu":
            used = statistics.median(cpu_rate for _, cpu_rate in ceilings)
            parallel = min(max((1 - 1 / max(used, 1.0)) / (1 - 1 / free), 0.0), 1.0)
        read_s = stages["read, cold" if self._read_is_cold() else "read"]
        return Chain(
            read_s=read_s,
            read_cpu_s=min(stages["read, CPU"], read_s),
            draw_s=stages["draw"],
            decode_s=stages["decode"],
            render_s=stages["render"],
            hand_over_s=stages["hand over"],
            batch=of_update,
            copy_s=stages.get("copy", 0.0) * of_update,
            forward_s=stages["forward"] * of_update,
            backward_s=stages["backward"] * of_update,
            optimizer_s=stages["optimizer"] * of_update,
            collectives_s=stages.get("collectives", 0.0) * of_update,
            host_s=stages.get("host", 0.0) * of_update,
            log_s=log_s,
            parallel_frac=parallel,
            device=here,
            cores=cores,
            cores_seen=float(os.cpu_count() or cores),
            held=cores - free,
            ranks=self.ranks_here,
            threads=self.threads,
            makers=min(2, self.settings.runtime.prefetch),
            loose=bool(self.index.is_tree(0)),
        )

    def _read_is_cold(self) -> bool:
        """Return whether the pictures are too many to stay in memory from one epoch to the next."""
        total = int(self.index.length.astype(np.int64).sum())
        available = read_memory().get("MemAvailable")
        return available is not None and total > RESERVED * available

    def _log_s(self) -> float:
        """Return the mean seconds an update of lines of the log and of checkpoints, written into the profile's folder."""
        runtime = self.settings.runtime
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            folder = RunFolder(Path(scratch))
            self._update(itertools.repeat(self._make_batch(min(FEW, self.of_rank))))
            record = self.trainer.log()
            start = time.perf_counter()
            run_folder.append_metrics(folder, {"kind": "train"} | asdict(record))
            line_s = time.perf_counter() - start
            save_s = 0.0
            if sum(parameter.numel() for parameter in self.trainer.step.parameters()) <= LARGEST_SAVED:
                start = time.perf_counter()
                self.trainer.save(folder.checkpoints)
                save_s = time.perf_counter() - start
        return line_s / runtime.log_every + save_s / runtime.checkpoint_every

    def _changes(self, chain: Chain, stages: Mapping[str, Sequence[float]]) -> list[Change]:
        """Return what could be otherwise, with what it would cost."""
        changes = [*thread_changes(chain), *renderer_changes(chain, self._other_renderers())]
        if self.device.type == "cpu" and torch.get_num_threads() > 1:
            changes.append(one_math_thread_change(chain, self._on_one_thread()))
        if self.settings.order == "shuffled":
            cold = self._read_is_cold()
            ratio = statistics.median(stages["read in order, cold"]) / max(statistics.median(stages["read, cold"]), 1e-9)
            changes.append(order_change(chain, chain.read_s * min(ratio, 1.0) if cold else chain.read_s))
        if chain.loose:
            changes.append(packing_change(chain, max(chain.read_cpu_s / 4, 1e-5)))
        changes.append(disk_change(chain, 10))
        changes.append(log_change(chain, 10, self.settings.runtime.log_every))
        short_sides = self.index.source_size[self.index.valid].min(1)
        frac = float(np.mean(np.minimum(SMALL_SIDE_PX / short_sides, 1.0) ** 2))
        by_byte = min(statistics.median(stages["read, by the byte"]) / max(statistics.median(stages["read, cold"]), 1e-9), 1.0)
        if frac < 0.9:
            changes.append(picture_size_change(chain, SMALL_SIDE_PX, frac, per_byte_frac=by_byte))
        fixed_s = self._fixed_s(chain)
        if (views := self._fewer_views(chain, fixed_s)) is not None:
            changes.append(views)
        changes.append(batch_change(chain, 2, fixed_s))
        changes += machine_changes(chain)
        return [*changes, *gpu_changes(chain, self._flop() * chain.batch, now_tflops=_rated_here(self.device))]

    def _other_renderers(self) -> dict[str, tuple[float, float]]:
        """Return, by name, the CPU-seconds of decoding and rendering a picture of the other renderers that serve here."""
        sample = self.index.replacement(self._some_ids(self.stage_pictures))
        with ShardReader(self.index) as reader:
            encoded = reader.read_batch(sample)
        records, _ = self._draw(sample, 0)
        costs = {}
        for name in RENDERERS.own:
            entry = renderer_entry(name)
            snaps = {family.snap for family in self.recipe.families}
            if name == self.settings.runtime.renderer or entry.cutter is None or entry.missing() or not snaps <= {*entry.snaps}:
                continue
            with closing(make_renderer(self.recipe, name, threads=0)) as renderer:
                self._render(renderer, sample[:2], encoded[:2], [record[[0, 1]] for record in records])  # the first ones warm up
                costs[name] = self._render(renderer, sample, encoded, records)
        return costs

    def _fewer_views(self, chain: Chain, fixed_s: float) -> Change | None:
        """Return half of the views of the family that has most, if one has several."""
        pixels = {family.name: family.views * family.size_px[0] * family.size_px[1] for family in self.recipe.families}
        most = max(self.recipe.families, key=lambda family: family.views)
        if most.views < 4:
            return None
        kept = most.views // 2
        left = sum(pixels.values()) - pixels[most.name] * (1 - kept / most.views)
        return views_change(chain, f"{kept} views of {most.name}, not {most.views}", left / sum(pixels.values()), fixed_s)

    def _fixed_s(self, chain: Chain) -> float:
        """Return what of an update's forward and backward does not depend on its pictures: from half a batch and a whole one."""
        if self.batch < 4:
            return 0.0
        half = self._make_batch(self.batch // 2)
        of_half, _, _ = self._train_on(half)
        whole_s = (chain.forward_s + chain.backward_s) / chain.batch * self._pictures(half) * 2
        half_s = (of_half["forward"] + of_half["backward"]) * self._pictures(half)
        return min(max(2 * half_s - whole_s, 0.0), half_s)

    def _flop(self) -> float:
        """Return the floating-point operations of training on a picture, as torch counts them."""
        batch = self._make_batch(min(FEW, self.of_rank))
        with FlopCounterMode(display=False) as counter:
            self.trainer.step(batch, self.trainer.progress).loss.backward()
        self.trainer.optimizer.zero_grad()
        return counter.get_total_flops() / len(batch)

    def _facts(self, free: float) -> dict[str, Any]:
        settings = self.settings
        return {
            "recipe": settings.recipe,
            "model": settings.model.described(),
            "pictures": len(self.index),
            "mean_kib": float(self.index.length.mean()) / 1024,
            "mean_megapixels": float(self.index.source_size.astype(np.int64).prod(1).mean()) / 1e6,
            "views": [f"{family.views} x {family.size_px[0]} px" for family in self.recipe.families],
            "renderer": settings.runtime.renderer,
            "threads": self.threads,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "ranks": self.ranks.count,
            "cores": self.cores,
            "cores_seen": os.cpu_count(),
            "free_cores": round(min(free, self.cores), 2),
            "batch": self.of_rank * settings.runtime.accumulation,
            "measured_batch": self.batch * settings.runtime.accumulation,
        }


def _read(reader: ShardReader, samples: NDArray[np.int64]) -> tuple[float, float]:
    """Return the seconds of reading a picture, by the clock and of the CPU; read as batches are."""
    start, cpu_start = time.perf_counter(), time.process_time()
    for first in range(0, len(samples), READ_BATCH):
        reader.read_batch(samples[first : first + READ_BATCH])
    return (time.perf_counter() - start) / len(samples), (time.process_time() - cpu_start) / len(samples)


def _decode_alone(encoded: Sequence[NDArray[np.uint8]]) -> float:
    """Return the CPU-seconds of decoding a whole picture."""
    start = time.process_time()
    for file in encoded:
        try:
            decode_picture(file)
        except DECODE_ERRORS:
            continue  # the loader says so
    return (time.process_time() - start) / len(encoded)


def _cores_got(threads: int) -> float:
    """Return how many cores so many threads get that hash, without the interpreter's lock."""
    block = bytes(1 << 20)

    def hash_until(end: float) -> None:
        while time.perf_counter() < end:
            hashlib.sha256(block)

    with ThreadPoolExecutor(threads) as pool:
        start, cpu_start = time.perf_counter(), time.process_time()
        list(pool.map(hash_until, [start + PROBE_S] * threads))
        return (time.process_time() - cpu_start) / (time.perf_counter() - start)


def _rated_here(device: torch.device) -> float | None:
    """Return the rated TFLOPS of the GPU that we run on, if it is one that we know."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops for known, tflops in RATED_TFLOPS.items() if known in name), None)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
