"""One contender of the loader's benchmark, alone in a fresh process: checked first, then timed; one JSON object on standard output.

Here: ours and decoding alone, who is who and cannot run here, how long each is let run.
Not here: what is right (checks.py); what others offer (peers.py); rounds, ratios (command.py, which starts
`python -m wherefrom.tools.bench_loader.contenders JOB`).
All deliver the same views a picture, mirrored, normalized float32, but peers 2 x 224 + 8 x 96 alone; who only decodes delivers pictures.
"""

import io
import itertools
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.order import KeyedSampler, Order
from wherefrom.pipeline.render.choose import RENDERERS, auto_preference, renderer_entry
from wherefrom.pipeline.render.renderer import RenderDevice
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.transform import Transformed, ViewTransform, collate
from wherefrom.pipeline.views import Batch, Record
from wherefrom.tools.bench_loader import peers
from wherefrom.tools.bench_loader.checks import (
    PLANTED_PX,
    DeliveryCheck,
    LoaderContender,
    ViewsName,
    bench_recipe,
    draw_bench_records,
    endless_ids,
    ids_to_check,
    worst_level_error,
)
from wherefrom.tools.bench_loader.process_tree import tree_cpu_s, tree_memory_mib

OURS: dict[str, tuple[str, RenderDevice]] = {  # our loaders: renderer and device, which is in the name unless it is the main one
    name if device == devices[0] else f"{name}_{device}": (name, device)
    for name, devices in ((name, renderer_entry(name).devices) for name in RENDERERS.own)
    for device in devices
}
TITLES: dict[str, str] = {
    **{name: f"wherefrom, {renderer} renderer" + " on the GPU" * (device == "cuda") for name, (renderer, device) in OURS.items()},
    "dataset": "DataLoader, our ViewTransform",
    "pil": f"DataLoader, {peers.PILLOW} and torchvision v1",
    "tv2": "DataLoader, torchvision v2 on tensors",
    "spdl": "SPDL threads, torchvision v2 on tensors",
    "kornia": "DataLoader, kornia (not antialiased)",
    "dali_own": "DALI's random_resized_crop on the CPU",
    "kornia_cuda": "kornia on the GPU (not antialiased)",
    "dali_own_cuda": "DALI's random_resized_crop on the GPU",
    "decode_dali": "decoding alone, DALI",
    "decode_threads": "decoding alone, simplejpeg in threads",
    "decode_torchvision": "decoding alone, torchvision in threads",
}
if TYPE_CHECKING:
    ContenderName = str
else:
    ContenderName = Literal[tuple(TITLES)]  # what the command line offers
ON_GPU: tuple[ContenderName, ...] = (*(name for name, (_, device) in OURS.items() if device == "cuda"), "kornia_cuda", "dali_own_cuda")
DECODERS: tuple[ContenderName, ...] = ("decode_dali", "decode_threads", "decode_torchvision")
LIBRARIES: dict[str, tuple[str, tuple[ContenderName, ...]]] = {  # of others, that need not be there: module, who uses it
    "NVIDIA DALI": ("nvidia.dali", ("dali_own", "dali_own_cuda", "decode_dali")),
    "kornia": ("kornia.augmentation", ("kornia", "kornia_cuda")),
    "SPDL": ("spdl.pipeline", ("spdl",)),
}
WARM_BATCHES = 4
DRAWN_BATCHES = 30  # over which the cost of draws is averaged
MEMORY_EPOCHS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderJob:
    """What one process measures."""

    contender: ContenderName
    data: str  # shards
    seconds: float
    threads: int  # or worker processes
    batch: int
    photometrics: bool = False
    views: ViewsName = "crops"
    plant: bool = False  # check against boxes that lie elsewhere: the check must find out
    memory: bool = False  # go through epochs and report memory, instead of speed


def why_missing(name: ContenderName) -> str | None:
    """Return why a contender cannot run on this machine, or None."""
    if name in ON_GPU and not torch.cuda.is_available():
        return "torch sees no CUDA GPU here"
    if name in OURS:
        return renderer_entry(OURS[name][0]).missing()
    needed = (library for library, (module, users) in LIBRARIES.items() if name in users and not peers.is_installed(module))
    return next((f"{library} is not installed" for library in needed), None)


class OurLoader:
    """Our loader with one of its renderers."""

    def __init__(self, job: LoaderJob, index: ShardIndex) -> None:
        self.job = job
        self.index = index
        self.recipe = bench_recipe(job.photometrics, job.views)
        renderer, device = OURS[job.contender]
        self.loader = make_loader(index, self.recipe, global_batch=job.batch, renderer=renderer, threads=job.threads, device=device)

    def check(self, plant: bool) -> list[DeliveryCheck]:
        ids = ids_to_check(self.index)
        return _check_records(self.loader.batch(ids).to("cpu"), self.job, self.index, plant)

    def batches(self) -> Iterator[int]:
        for batch in self.loader.forever():
            yield len(batch)

    def draw_cpu_s(self) -> float:
        """Return the CPU seconds that draws and records of one picture take."""
        ids = np.arange(self.job.batch)
        start = time.thread_time()
        for epoch in range(DRAWN_BATCHES):
            draw_bench_records(self.recipe, self.index, ids, epoch)
        return (time.thread_time() - start) / (DRAWN_BATCHES * self.job.batch)


class OurTransform:
    """A DataLoader with our `ViewTransform` in it: what people with a dataset of their own get instead of torchvision v2."""

    def __init__(self, job: LoaderJob, index: ShardIndex) -> None:
        from torch.utils.data import DataLoader

        self.job = job
        self.index = index
        self.reader = ShardReader(index)
        self.transform = ViewTransform(bench_recipe(job.photometrics, job.views))
        self.keys = KeyedSampler(Order(samples=len(index), global_batch=job.batch, seed=0))
        dataset: Any = self
        self.loader: Any = DataLoader(dataset, batch_sampler=self._endless_keys(), num_workers=job.threads, collate_fn=collate)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Transformed:
        samples = self.index.replacement(np.array([sample for _, sample in keys]))
        return self.transform.batch([peers.decode_with_torchvision(self.reader.read(int(sample))) for sample in samples], keys=keys)

    def _endless_keys(self) -> Any:
        while True:  # each pass is the next epoch
            yield from self.keys

    def check(self, plant: bool) -> list[DeliveryCheck]:
        ids = ids_to_check(self.index)
        return _check_records(self.__getitems__([(0, i) for i in ids.tolist()]).batch, self.job, self.index, plant)

    def batches(self) -> Iterator[int]:
        for transformed in self.loader:
            yield len(transformed.batch)


def _check_records(batch: Batch, job: LoaderJob, index: ShardIndex, plant: bool) -> list[DeliveryCheck]:
    """Compare pixels with what their records say, and records with what was to be drawn."""
    expected = draw_bench_records(bench_recipe(False, job.views), index, batch.sample.numpy())  # color changes no box
    strangers = sum(
        int((views.geometry.boxes != record.geometry.boxes).sum() + (views.geometry.flipped != record.geometry.flipped).sum())
        for views, record in zip(batch.views, expected, strict=True)
    )
    delivered = [Record.of(views.geometry, views.photometric) for views in batch.views]
    error = worst_level_error(index, delivered, lambda family, b: batch.views[family].pixels[b], plant)
    # the torch renderer rounds between its steps, GPUs decode their own way
    limit = 0.1 if job.contender == auto_preference("cpu")[0] else 1.0 if job.photometrics or job.contender in ON_GPU else 0.5
    return [
        DeliveryCheck(name="levels off the float64 reference", value=error, limit=limit),
        DeliveryCheck(name="recorded numbers other than drawn", value=strangers, limit=0),
    ]


class DecodeInThreads:
    """Decoding alone, in threads: by simplejpeg with a buffer each, or by torchvision."""

    def __init__(self, job: LoaderJob, index: ShardIndex) -> None:
        self.index = index
        self.reader = ShardReader(index)
        self.pool = ThreadPoolExecutor(job.threads)
        self.batch = job.batch
        self.decode = self._with_torchvision if job.contender == "decode_torchvision" else self._with_simplejpeg
        pixels = int(index.source_size.prod(-1, dtype=np.int64).max())
        self.buffers = [np.empty(3 * pixels, np.uint8) for _ in range(job.threads)]

    def check(self, plant: bool) -> list[DeliveryCheck]:
        ids = ids_to_check(self.index).tolist()
        return [_check_decoding(self.index, ids, [self.decode(i, self.buffers[0]).copy() for i in ids], plant)]

    def batches(self) -> Iterator[int]:
        for ids in endless_ids(self.index, self.batch):
            list(self.pool.map(self._decode_all, (ids[n :: len(self.buffers)] for n in range(len(self.buffers))), self.buffers))
            yield len(ids)

    def _decode_all(self, ids: list[int], buffer: NDArray[np.uint8]) -> None:
        for sample in ids:
            self.decode(sample, buffer)

    def _with_simplejpeg(self, sample: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return decode_picture(self.reader.read(sample), buffer=buffer)

    def _with_torchvision(self, sample: int, _: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return peers.decode_with_torchvision(self.reader.read(sample)).permute(1, 2, 0).numpy()


class DecodeWithDali:
    """Decoding alone, by DALI on the CPU."""

    def __init__(self, job: LoaderJob, index: ShardIndex) -> None:
        from nvidia.dali import fn, pipeline_def, types

        self.index = index
        self.first = ids_to_check(index).tolist()
        reader = ShardReader(index)
        batches = itertools.chain([self.first], endless_ids(index, job.batch))

        @pipeline_def(batch_size=max(job.batch, len(self.first)), num_threads=job.threads, device_id=None, prefetch_queue_depth=2)
        def graph() -> Any:
            files = fn.external_source(source=lambda: [reader.read(i) for i in next(batches)], batch=True, dtype=types.UINT8, ndim=1)
            return fn.decoders.image(files, device="cpu")

        self.pipeline = graph()
        self.pipeline.build()

    def check(self, plant: bool) -> list[DeliveryCheck]:
        (decoded,) = self.pipeline.run()
        return [_check_decoding(self.index, self.first, [np.array(decoded.at(n)) for n in range(len(self.first))], plant)]

    def batches(self) -> Iterator[int]:
        while True:
            (decoded,) = self.pipeline.run()
            yield len(decoded)


def _check_decoding(index: ShardIndex, ids: list[int], decoded: Sequence[NDArray[np.uint8]], plant: bool) -> DeliveryCheck:
    """Compare pictures with Pillow's."""
    worst = 0.0
    with ShardReader(index) as reader:
        for sample, picture in zip(ids, decoded, strict=True):
            truth = np.asarray(Image.open(io.BytesIO(reader.read(sample).tobytes())).convert("RGB")).astype(float)
            worst = max(worst, float(np.abs(np.roll(picture, int(PLANTED_PX), 1) - truth if plant else picture - truth).mean()))
    return DeliveryCheck(name="levels off Pillow's decoding", value=worst, limit=0.02)


def time_batches(contender: LoaderContender, seconds: float, settle: Callable[[], None]) -> dict[str, float]:
    """Let batches come for some seconds, once they come steadily; `settle` waits until a batch is there wholly."""
    stream = contender.batches()
    for _ in range(WARM_BATCHES):
        next(stream)
    settle()
    pictures, cpu_s, start = 0, tree_cpu_s(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        pictures += next(stream)
        settle()
    wall_s = time.perf_counter() - start
    return {"pictures": pictures, "wall_s": wall_s, "cpu_s": tree_cpu_s() - cpu_s, "memory_mib": tree_memory_mib()}


def memory_by_epoch(ours: OurLoader) -> list[float]:
    """Return the memory after each of some epochs, MiB."""
    memory = []
    for _ in range(MEMORY_EPOCHS):
        for _ in ours.loader:
            pass
        memory.append(tree_memory_mib())
    return memory


def make_contender(job: LoaderJob, index: ShardIndex) -> LoaderContender:
    """Build the contender that a job names."""
    threads, batch = job.threads, job.batch
    match job.contender:
        case "dataset":
            return OurTransform(job, index)
        case "pil":
            return peers.UsualLoader(peers.pillow(job.photometrics), index, threads=threads, batch=batch)
        case "tv2":
            return peers.UsualLoader(peers.torchvision_v2(job.photometrics), index, threads=threads, batch=batch)
        case "kornia":
            return peers.UsualLoader(peers.kornia(job.photometrics), index, threads=threads, batch=batch)
        case "kornia_cuda":
            return peers.BatchTransform(peers.kornia(job.photometrics), index, batch=batch, device="cuda")
        case "spdl":
            return peers.SpdlLoader(peers.torchvision_v2(job.photometrics), index, threads=threads, batch=batch)
        case "dali_own" | "dali_own_cuda":
            device = "cuda" if job.contender in ON_GPU else "cpu"
            return peers.DaliCrops(index, threads=threads, batch=batch, photometrics=job.photometrics, device=device)
        case "decode_threads" | "decode_torchvision":
            return DecodeInThreads(job, index)
        case "decode_dali":
            return DecodeWithDali(job, index)
        case _:
            return OurLoader(job, index)


def main(argument: str) -> int:
    """Check and measure one contender, as the JSON of a LoaderJob says."""
    if platform.system() != "Linux":
        raise OSError(f"the benchmark reads /proc, which {platform.system()} has not; run it on Linux")
    warnings.simplefilter("ignore", DeprecationWarning)  # torchvision 0.29 announces the end of its decoders
    job = LoaderJob(**json.loads(argument))
    index = ShardIndex.open(job.data)
    job = replace(job, batch=min(job.batch, len(index)))
    contender = make_contender(job, index)
    checks = contender.check(job.plant)
    result: dict[str, Any] = {"checks": [asdict(check) | {"passed": check.passed} for check in checks]}
    if all(check.passed for check in checks):
        if job.memory and isinstance(contender, OurLoader):
            result["memory_mib"] = memory_by_epoch(contender)
        else:
            result |= time_batches(contender, job.seconds, torch.cuda.synchronize if job.contender in ON_GPU else lambda: None)
            if isinstance(contender, OurLoader):
                result["draw_share"] = contender.draw_cpu_s() * result["pictures"] / result["cpu_s"]
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
