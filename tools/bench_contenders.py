"""One contender of the loader's benchmark, alone in a fresh process: checked first, then timed; one JSON object on standard output.

Here: what is compared (ours, two usual DataLoaders, decoding alone), and how long it is let run.
Not here: what is right (bench_checks.py); rounds, ratios (bench_loader.py, which starts `python -m wherefrom.tools.bench_contenders PLAN`).
All deliver 2 x 224 + 8 x 96 antialiased views a picture, mirrored, normalised float32; who only decodes delivers pictures.
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
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.reader import ShardReader
from wherefrom.pipeline.recipe import IMAGENET_MEAN, IMAGENET_STD
from wherefrom.pipeline.shards import ShardIndex
from wherefrom.tools.bench_checks import ASPECT, COLOUR, FAMILIES, PLANTED_PX, Check, bench_recipe, checked_ids, drawn, views_off
from wherefrom.tools.process_tree import tree_cpu_s, tree_memory_mib

Name = Literal["torch", "dali", "pil", "tv2", "decode_dali", "decode_threads"]

BATCH = 32  # small beside what a round delivers: workers hand over whole batches
WARM_BATCHES = 4
DRAWN_BATCHES = 30  # over which the cost of draws is averaged
MEMORY_EPOCHS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a process is asked to measure."""

    contender: Name
    data: str  # shards
    seconds: float
    threads: int  # or worker processes
    photometrics: bool = False
    plant: bool = False  # check against boxes that lie elsewhere: the check must find out
    memory: bool = False  # go through epochs and report memory, instead of speed


class Contender(Protocol):
    """Anything that delivers batches."""

    def check(self, plant: bool) -> list[Check]:
        """Compare what is delivered with what it should be."""
        ...

    def batches(self) -> Iterator[int]:
        """Deliver without end; yield how many pictures each batch has."""
        ...


class Ours:
    """Our loader with one of its renderers."""

    def __init__(self, plan: Plan, index: ShardIndex) -> None:
        self.index = index
        self.recipe = bench_recipe(plan.photometrics)
        self.limit = 1.0 if plan.photometrics else 0.5
        self.batch = min(BATCH, len(index))
        renderer: Literal["dali", "torch"] = "dali" if plan.contender == "dali" else "torch"
        self.loader = make_loader(index, self.recipe, global_batch=self.batch, renderer=renderer, threads=plan.threads)

    def check(self, plant: bool) -> list[Check]:
        ids = checked_ids(self.index)
        batch, records = self.loader.batch(ids), drawn(self.recipe, self.index, ids)
        strangers = sum(
            int((views.geometry.boxes != record.boxes).sum() + (views.geometry.flipped != record.flipped).sum())
            for views, (record, _) in zip(batch.views, records, strict=True)
        )
        delivered = [(views.geometry, views.photometric) for views in batch.views]
        off = views_off(self.index, delivered, lambda family, b: batch.views[family].pixels[b], plant)
        return [
            Check(name="levels off the float64 reference", value=off, limit=self.limit),
            Check(name="recorded numbers other than drawn", value=strangers, limit=0),
        ]

    def batches(self) -> Iterator[int]:
        for batch in self.loader.forever():
            yield len(batch)

    def draw_cpu_s(self) -> float:
        """Return the CPU seconds that draws and records of one picture take."""
        ids = np.arange(self.batch)
        start = time.thread_time()
        for epoch in range(DRAWN_BATCHES):
            drawn(self.recipe, self.index, ids, epoch)
        return (time.thread_time() - start) / (DRAWN_BATCHES * self.batch)


class Usual:
    """A DataLoader with worker processes, as one writes it with torchvision: decode a file, then a transform for each view."""

    def __init__(self, plan: Plan, index: ShardIndex) -> None:
        from torch.utils.data import DataLoader, RandomSampler

        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision 0.29 announces the end of its decoders
        self.index = index
        self.reader = ShardReader(index)
        self.decode, self.cut, self.views = (_pil if plan.contender == "pil" else _tv2)(plan.photometrics)
        dataset: Any = self  # it has the two methods that a dataset needs
        endless = RandomSampler(range(len(index)), replacement=True, num_samples=1 << 40)
        self.loader: Any = DataLoader(dataset, batch_size=min(BATCH, len(index)), sampler=endless, num_workers=plan.threads)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, sample: int) -> list[Tensor]:
        picture = self.decode(self.reader.read(sample))
        return [view(picture) for view in self.views]

    def check(self, plant: bool) -> list[Check]:
        """Cut boxes that we draw, with the resizing that its transforms use."""
        ids = checked_ids(self.index)
        plain = [(replace(r, flipped=torch.zeros_like(r.flipped)), colour) for r, colour in drawn(bench_recipe(False), self.index, ids)]

        def pixels(family: int, b: int) -> Tensor:
            record, picture = plain[family][0], self.decode(self.reader.read(int(ids[b])))
            return torch.stack([self.cut(picture, box, record.size_px[0]) for box in record.boxes[b].int().tolist()])

        return [Check(name="levels off the float64 reference", value=views_off(self.index, plain, pixels, plant), limit=0.5)]

    def batches(self) -> Iterator[int]:
        for batch in self.loader:
            yield len(batch[0])


Parts = tuple[Callable[[NDArray[np.uint8]], Any], Callable[[Any, list[int], int], Tensor], list[Callable[[Any], Tensor]]]


def _pil(photometrics: bool) -> Parts:
    """Pillow and torchvision's first transforms."""
    from torchvision import transforms
    from torchvision.transforms import functional

    bilinear = transforms.InterpolationMode.BILINEAR
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def decode(encoded: NDArray[np.uint8]) -> Image.Image:
        return Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")

    def cut(picture: Image.Image, box: list[int], side: int) -> Tensor:
        x0, y0, x1, y1 = box
        return finish(functional.resized_crop(picture, y0, x0, y1 - y0, x1 - x0, [side, side], bilinear))

    def blur(picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*COLOUR.blur_sigma_px))))

    colour = [
        transforms.RandomApply([_jitter(transforms)], COLOUR.jitter_prob),
        transforms.RandomGrayscale(COLOUR.grey_prob),
        transforms.RandomApply([transforms.Lambda(blur)], COLOUR.blur_prob),
        transforms.RandomSolarize(128, COLOUR.solarise_prob),
    ]

    def view(side: int, area: tuple[float, float]) -> Callable[[Any], Tensor]:
        crop = transforms.RandomResizedCrop(side, area, ASPECT, bilinear)
        return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *(colour if photometrics else []), finish])

    return decode, cut, [view(side, area) for views, side, area in FAMILIES for _ in range(views)]


def _tv2(photometrics: bool) -> Parts:
    """torchvision's second transforms, on uint8 tensors from its own decoder."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))])

    def decode(encoded: NDArray[np.uint8]) -> Tensor:
        return decode_image(torch.from_numpy(encoded), ImageReadMode.RGB)

    def cut(picture: Tensor, box: list[int], side: int) -> Tensor:
        x0, y0, x1, y1 = box
        return finish(v2.functional.resized_crop(picture, y0, x0, y1 - y0, x1 - x0, [side, side], antialias=True))

    colour = [
        v2.RandomApply([_jitter(v2)], COLOUR.jitter_prob),
        v2.RandomGrayscale(COLOUR.grey_prob),
        v2.RandomApply([v2.GaussianBlur(9, COLOUR.blur_sigma_px)], COLOUR.blur_prob),
        v2.RandomSolarize(128, COLOUR.solarise_prob),
    ]

    def view(side: int, area: tuple[float, float]) -> Callable[[Any], Tensor]:
        crop = v2.RandomResizedCrop((side, side), area, ASPECT, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), *(colour if photometrics else []), finish])

    return decode, cut, [view(side, area) for views, side, area in FAMILIES for _ in range(views)]


def _jitter(transforms: Any) -> Any:
    return transforms.ColorJitter(COLOUR.brightness, COLOUR.contrast, COLOUR.saturation, COLOUR.hue)


class DecodeInThreads:
    """Decoding alone, by simplejpeg in threads with a buffer each."""

    def __init__(self, plan: Plan, index: ShardIndex) -> None:
        self.index = index
        self.reader = ShardReader(index)
        self.pool = ThreadPoolExecutor(plan.threads)
        pixels = int(index.source_size.prod(-1, dtype=np.int64).max())
        self.buffers = [np.empty(3 * pixels, np.uint8) for _ in range(plan.threads)]

    def check(self, plant: bool) -> list[Check]:
        ids = checked_ids(self.index).tolist()
        return [_decoding_check(self.index, ids, [decode_picture(self.reader.read(i)) for i in ids], plant)]

    def batches(self) -> Iterator[int]:
        for ids in _endless_ids(self.index):
            list(self.pool.map(self._decode, (ids[n :: len(self.buffers)] for n in range(len(self.buffers))), self.buffers))
            yield len(ids)

    def _decode(self, ids: list[int], buffer: NDArray[np.uint8]) -> None:
        for sample in ids:
            decode_picture(self.reader.read(sample), buffer=buffer)


class DecodeWithDali:
    """Decoding alone, by DALI on the CPU."""

    def __init__(self, plan: Plan, index: ShardIndex) -> None:
        from nvidia.dali import fn, pipeline_def, types

        self.index = index
        self.first = checked_ids(index).tolist()
        reader = ShardReader(index)
        asked = itertools.chain([self.first], _endless_ids(index))

        @pipeline_def(batch_size=BATCH, num_threads=plan.threads, device_id=None, prefetch_queue_depth=2)
        def graph() -> Any:
            files = fn.external_source(source=lambda: [reader.read(i) for i in next(asked)], batch=True, dtype=types.UINT8, ndim=1)
            return fn.decoders.image(files, device="cpu")

        self.pipeline = graph()
        self.pipeline.build()

    def check(self, plant: bool) -> list[Check]:
        (decoded,) = self.pipeline.run()
        return [_decoding_check(self.index, self.first, [np.array(decoded.at(n)) for n in range(len(self.first))], plant)]

    def batches(self) -> Iterator[int]:
        while True:
            (decoded,) = self.pipeline.run()
            yield len(decoded)


def _endless_ids(index: ShardIndex) -> Iterator[list[int]]:
    sound = np.flatnonzero(index.sound)
    for start in itertools.count(0, BATCH):
        yield sound[np.arange(start, start + BATCH) % len(sound)].tolist()


def _decoding_check(index: ShardIndex, ids: list[int], decoded: Sequence[NDArray[np.uint8]], plant: bool) -> Check:
    """Compare pictures with Pillow's."""
    worst = 0.0
    with ShardReader(index) as reader:
        for sample, picture in zip(ids, decoded, strict=True):
            truth = np.asarray(Image.open(io.BytesIO(reader.read(sample).tobytes())).convert("RGB")).astype(float)
            worst = max(worst, float(np.abs(np.roll(picture, int(PLANTED_PX), 1) - truth if plant else picture - truth).mean()))
    return Check(name="levels off Pillow's decoding", value=worst, limit=0.02)


def timed(contender: Contender, seconds: float) -> dict[str, float]:
    """Let batches come for some seconds, once they come steadily."""
    stream = contender.batches()
    for _ in range(WARM_BATCHES):
        next(stream)
    pictures, cpu_s, start = 0, tree_cpu_s(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        pictures += next(stream)
    wall_s = time.perf_counter() - start
    return {"pictures": pictures, "wall_s": wall_s, "cpu_s": tree_cpu_s() - cpu_s, "memory_mib": tree_memory_mib()}


def memory_by_epoch(ours: Ours) -> list[float]:
    """Return the memory after each of some epochs, MiB."""
    memory = []
    for _ in range(MEMORY_EPOCHS):
        for _ in ours.loader:
            pass
        memory.append(tree_memory_mib())
    return memory


def make_contender(plan: Plan, index: ShardIndex) -> Contender:
    """Build the contender that a plan names."""
    if plan.contender in ("pil", "tv2"):
        return Usual(plan, index)
    if plan.contender == "decode_threads":
        return DecodeInThreads(plan, index)
    return DecodeWithDali(plan, index) if plan.contender == "decode_dali" else Ours(plan, index)


def main(argument: str) -> int:
    """Check and measure one contender, as the JSON of a Plan says."""
    if platform.system() != "Linux":
        raise OSError(f"the benchmark reads /proc, which {platform.system()} has not; run it on Linux")
    plan = Plan(**json.loads(argument))
    contender = make_contender(plan, ShardIndex.open(plan.data))
    checks = contender.check(plan.plant)
    result: dict[str, Any] = {"checks": [asdict(check) | {"passed": check.passed} for check in checks]}
    if all(check.passed for check in checks):
        if plan.memory and isinstance(contender, Ours):
            result["memory_mib"] = memory_by_epoch(contender)
        else:
            result |= timed(contender, plan.seconds)
            if isinstance(contender, Ours):
                result["draw_share"] = contender.draw_cpu_s() * result["pictures"] / result["cpu_s"]
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
