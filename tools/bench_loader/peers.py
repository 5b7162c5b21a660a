"""What others offer for the same views: the peers in the loader's benchmark, each written as its own users would write it.

Here: Pillow and torchvision in a DataLoader, SPDL's threads, kornia, DALI's own random crops; why one of them cannot run here.
Not here: what they have to deliver (checks.py), timing them (contenders.py). They need not be installed.
They keep no records, so it is their resizing that is checked: on boxes that we draw, or on whole pictures where they take no boxes.
"""

import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD
from wherefrom.pipeline.views import Record
from wherefrom.tools.bench_loader.checks import (
    ASPECT,
    COLOR,
    FAMILIES,
    DeliveryCheck,
    bench_recipe,
    draw_bench_records,
    endless_ids,
    ids_to_check,
    worst_level_error,
)

PILLOW = "pillow-simd" if "post" in PIL.__version__ else "Pillow"  # the fork calls itself by the same name
FFCV_MISSING = "FFCV is left out: it reads files of a format of its own and resizes with OpenCV's area filter, which makes other views"
BLUR_TAPS = 9  # of torchvision's and kornia's blur


def is_installed(module: str) -> bool:
    """Say whether a module can be imported, without doing so."""
    parents = module.split(".")[:-1]
    return all(importlib.util.find_spec(".".join(parents[: n + 1])) for n in range(len(parents))) and bool(importlib.util.find_spec(module))


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """How one library decodes a file, cuts a given box, and makes views of its own choice."""

    decode: Callable[[NDArray[np.uint8]], Any]
    cut: Callable[[Any, list[int], int], Tensor]  # (picture, xyxy, side in pixels) -> (3, side, side), normalized
    views: Sequence[tuple[Callable[[Any], Any], Callable[[Any], Tensor]]]  # a random crop, and what follows it
    antialias: bool = True


class UsualLoader:
    """A DataLoader with worker processes, as one writes it: decode a file, then a transform for each view."""

    def __init__(self, library: Library, index: ShardIndex, *, threads: int, batch: int) -> None:
        from torch.utils.data import DataLoader, RandomSampler

        self.index = index
        self.library = library
        self.reader = ShardReader(index)
        self.valid = np.flatnonzero(index.valid)
        dataset: Any = self  # it has the two methods that a dataset needs
        endless = RandomSampler(range(len(self.valid)), replacement=True, num_samples=1 << 40)
        self.loader: Any = DataLoader(dataset, batch_size=batch, sampler=endless, num_workers=threads)

    def __len__(self) -> int:
        return len(self.valid)

    def __getitem__(self, number: int) -> list[Tensor]:
        picture = self.library.decode(self.reader.read(int(self.valid[number])))
        return [rest(crop(picture)) for crop, rest in self.library.views]

    def check(self, plant: bool) -> list[DeliveryCheck]:
        return [_check_cuts(self.library, self.index, plant)]

    def batches(self) -> Iterator[int]:
        for batch in self.loader:
            yield len(batch[0])


class SpdlLoader:
    """SPDL's pipeline: the same work in threads of one process."""

    def __init__(self, library: Library, index: ShardIndex, *, threads: int, batch: int) -> None:
        self.index = index
        self.library = library
        self.reader = ShardReader(index)
        self.threads, self.batch = threads, batch

    def check(self, plant: bool) -> list[DeliveryCheck]:
        return [_check_cuts(self.library, self.index, plant)]

    def batches(self) -> Iterator[int]:
        from torch.utils.data import default_collate

        ids = (sample for batch in endless_ids(self.index, self.batch) for sample in batch)
        builder = import_module("spdl.pipeline").PipelineBuilder().add_source(ids).pipe(self._views, concurrency=self.threads)
        pipeline = builder.aggregate(self.batch).pipe(default_collate).add_sink(2).build(num_threads=self.threads)
        with pipeline.auto_stop():
            for batch in pipeline:
                yield len(batch[0])

    def _views(self, sample: int) -> list[Tensor]:
        torch.set_num_threads(1)  # it belongs to the thread, and these are SPDL's
        picture = self.library.decode(self.reader.read(sample))
        return [rest(crop(picture)) for crop, rest in self.library.views]


class BatchTransform:
    """A whole batch decoded and transformed on one device, as one uses kornia on a GPU: crops one by one, the rest together."""

    def __init__(self, library: Library, index: ShardIndex, *, batch: int, device: str) -> None:
        self.index = index
        self.library = library
        self.reader = ShardReader(index)
        self.batch, self.device = batch, device

    def check(self, plant: bool) -> list[DeliveryCheck]:
        on_device = replace(self.library, decode=lambda encoded: self._decode_all([encoded])[0])
        return [_check_cuts(on_device, self.index, plant)]

    def batches(self) -> Iterator[int]:
        for ids in endless_ids(self.index, self.batch):
            pictures = self._decode_all([self.reader.read(sample) for sample in ids])
            for crop, rest in self.library.views:
                rest(torch.cat([crop(picture) for picture in pictures]))
            yield len(ids)

    def _decode_all(self, encoded: Sequence[NDArray[np.uint8]]) -> list[Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg([torch.from_numpy(file) for file in encoded], ImageReadMode.RGB, device=self.device)


class DaliCrops:
    """DALI's random_resized_crop: boxes that nobody gets to know."""

    def __init__(self, index: ShardIndex, *, threads: int, batch: int, photometrics: bool, device: str) -> None:
        self.index = index
        self.reader = ShardReader(index)
        self.settings = {"threads": threads, "photometrics": photometrics, "device": device}
        self.batch = batch

    def check(self, plant: bool) -> list[DeliveryCheck]:
        """Have the whole of each picture cropped."""
        ids = ids_to_check(self.index)
        whole = []
        for record in _unmirrored_records(self.index, ids):
            wh = record.geometry.source_size.flip(-1)[:, None].expand(-1, len(record.geometry.view), -1)
            boxes = torch.cat([torch.zeros_like(wh), wh], -1).float()
            whole.append(replace(record, geometry=replace(record.geometry, boxes=boxes)))
        delivered = []
        for sample in ids.tolist():
            height, width = self.index.source_size[sample].tolist()
            pipeline = self._graph(iter([[sample]]), batch=1, whole=width / height)
            delivered.append([_as_tensor(views)[0] for views in pipeline.run()])

        def pixels(family: int, b: int) -> Tensor:
            first = sum(views for views, _, _ in FAMILIES[:family])
            return torch.stack(delivered[b][first : first + FAMILIES[family][0]])

        return [
            DeliveryCheck(name="levels off the float64 reference", value=worst_level_error(self.index, whole, pixels, plant), limit=1.0)
        ]

    def batches(self) -> Iterator[int]:
        pipeline = self._graph(endless_ids(self.index, self.batch), batch=self.batch)
        while True:
            yield len(pipeline.run()[0])

    def _graph(self, ids: Iterator[list[int]], *, batch: int, whole: float | None = None) -> Any:
        """Build the pipeline; `whole` is the aspect of the only picture, of which then everything is shown as it is."""
        from nvidia.dali import fn, pipeline_def, types

        threads, on_gpu = self.settings["threads"], self.settings["device"] == "cuda"
        colors = _dali_colors if self.settings["photometrics"] and whole is None else lambda views: views

        def files() -> list[NDArray[np.uint8]]:
            return [self.reader.read(sample) for sample in next(ids)]

        @pipeline_def(
            batch_size=batch,
            num_threads=threads,
            device_id=0 if on_gpu else None,
            prefetch_queue_depth=1 if whole else 2,
            enable_conditionals=True,
        )
        def graph() -> Any:
            encoded = fn.external_source(source=files, batch=True, dtype=types.UINT8, ndim=1)
            pictures = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu")
            return _dali_views(pictures, colors, whole)

        pipeline = graph()
        pipeline.build()
        return pipeline


def _dali_views(pictures: Any, colors: Callable[[Any], Any], whole: float | None) -> tuple[Any, ...]:
    """Return every view of a graph's pictures, normalized; `whole` as for `DaliCrops._graph`."""
    from nvidia.dali import fn, types

    views = []
    for number, side, area in FAMILIES:
        for _ in range(number):
            crop = fn.random_resized_crop(
                pictures,
                size=[side, side],
                random_area=(1.0, 1.0) if whole else area,
                random_aspect_ratio=(whole, whole) if whole else ASPECT,
                antialias=True,
            )
            view = fn.crop_mirror_normalize(
                colors(crop),
                mirror=0 if whole else fn.random.coin_flip(),
                mean=[255 * value for value in IMAGENET_MEAN],
                std=[255 * value for value in IMAGENET_STD],
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            views.append(view)
    return tuple(views)


def _as_tensor(views: Any) -> Tensor:
    return torch.from_dlpack(views.as_tensor()).cpu()


def _dali_colors(views: Any) -> Any:
    """Return views with DALI's own color twist, blur and solarization; each `if` is an operator of the graph, decided view by view."""
    from nvidia.dali import fn, types

    def around(strength: float, center: float = 1.0) -> Any:
        """Return uniform numbers around a center, and the center itself where the twist is left out."""
        return center + is_jittered * fn.random.uniform(range=(-strength, strength))

    def share(probability: float) -> Any:
        return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)

    is_jittered, gray = share(COLOR.jitter_prob), share(COLOR.gray_prob)
    views = fn.color_twist(
        views,
        brightness=around(COLOR.brightness),
        contrast=around(COLOR.contrast),
        saturation=around(COLOR.saturation) * (1 - gray),
        hue=around(360 * COLOR.hue, center=0.0),
    )
    if fn.random.coin_flip(probability=COLOR.blur_prob, dtype=types.BOOL):
        views = fn.gaussian_blur(views, sigma=fn.random.uniform(range=COLOR.blur_sigma_px))
    if fn.random.coin_flip(probability=COLOR.solarize_prob, dtype=types.BOOL):
        levels = list(range(256))
        views = fn.lookup_table(views, keys=levels, values=[level if level < 128 else 255 - level for level in levels], dtype=types.UINT8)
    return views


def _check_cuts(library: Library, index: ShardIndex, plant: bool) -> DeliveryCheck:
    """Cut boxes that we draw, with the resizing that a library's transforms use."""
    ids = ids_to_check(index)
    records = _unmirrored_records(index, ids)
    reader = ShardReader(index)

    def pixels(family: int, b: int) -> Tensor:
        geometry, picture = records[family].geometry, library.decode(reader.read(int(ids[b])))
        return torch.stack([library.cut(picture, box, geometry.size_px[0]) for box in geometry.boxes[b].int().tolist()]).cpu()

    value = worst_level_error(index, records, pixels, plant, antialias=library.antialias)
    yardstick = "the float64 reference" if library.antialias else "unfiltered views in float64"
    return DeliveryCheck(name=f"levels off {yardstick}", value=value, limit=0.5)


def _unmirrored_records(index: ShardIndex, ids: NDArray[np.int64]) -> list[Record]:
    """Return the bench's records without mirrors and color: most libraries cut a given box and no more."""
    records = draw_bench_records(bench_recipe(False), index, ids)
    geometries = [replace(record.geometry, flipped=torch.zeros_like(record.geometry.flipped)) for record in records]
    return [replace(record, geometry=geometry) for record, geometry in zip(records, geometries, strict=True)]


def pillow(photometrics: bool) -> Library:
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
        return picture.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*COLOR.blur_sigma_px))))

    color = [
        transforms.RandomApply([_jitter(transforms)], COLOR.jitter_prob),
        transforms.RandomGrayscale(COLOR.gray_prob),
        transforms.RandomApply([transforms.Lambda(blur)], COLOR.blur_prob),
        transforms.RandomSolarize(128, COLOR.solarize_prob),
    ]
    rest = transforms.Compose([transforms.RandomHorizontalFlip(), *(color if photometrics else []), finish])
    views = [(transforms.RandomResizedCrop(side, area, ASPECT, bilinear), rest) for number, side, area in FAMILIES for _ in range(number)]
    return Library(decode=decode, cut=cut, views=views)


def torchvision_v2(photometrics: bool) -> Library:
    """torchvision's second transforms, on uint8 tensors from its own decoder."""
    from torchvision.transforms import v2

    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))])

    def cut(picture: Tensor, box: list[int], side: int) -> Tensor:
        x0, y0, x1, y1 = box
        return finish(v2.functional.resized_crop(picture, y0, x0, y1 - y0, x1 - x0, [side, side], antialias=True))

    color = [
        v2.RandomApply([_jitter(v2)], COLOR.jitter_prob),
        v2.RandomGrayscale(COLOR.gray_prob),
        v2.RandomApply([v2.GaussianBlur(BLUR_TAPS, COLOR.blur_sigma_px)], COLOR.blur_prob),
        v2.RandomSolarize(128, COLOR.solarize_prob),
    ]
    rest = v2.Compose([v2.RandomHorizontalFlip(), *(color if photometrics else []), finish])
    views = [
        (v2.RandomResizedCrop((side, side), area, ASPECT, antialias=True), rest) for number, side, area in FAMILIES for _ in range(number)
    ]
    return Library(decode=decode_with_torchvision, cut=cut, views=views)


def kornia(photometrics: bool) -> Library:
    """kornia's augmentations, on float tensors from torchvision's decoder; its random crop filters nothing before it samples."""
    augmentation = import_module("kornia.augmentation")
    finish = augmentation.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))

    def crops(side: int, area: tuple[float, float]) -> Any:
        return augmentation.RandomResizedCrop((side, side), area, ASPECT, align_corners=False)

    def cut(picture: Tensor, box: list[int], side: int) -> Tensor:
        crop = crops(side, (0.1, 1.0))
        floats = picture[None] / 255
        params = crop.forward_parameters(floats.shape)
        x0, y0, x1, y1 = box[0], box[1], box[2] - 1, box[3] - 1  # corner pixels, inclusive
        params["src"] = torch.tensor([[[x0, y0], [x1, y0], [x1, y1], [x0, y1]]], dtype=torch.float32)
        return finish(crop(floats, params=params))[0]

    def many(side: int, area: tuple[float, float], number: int) -> Callable[[Tensor], Tensor]:
        crop = crops(side, area)
        return lambda picture: crop((picture[None] / 255).expand(number, -1, -1, -1))

    color = [
        augmentation.ColorJitter(COLOR.brightness, COLOR.contrast, COLOR.saturation, COLOR.hue, p=COLOR.jitter_prob),
        augmentation.RandomGrayscale(p=COLOR.gray_prob),
        augmentation.RandomGaussianBlur((BLUR_TAPS, BLUR_TAPS), COLOR.blur_sigma_px, p=COLOR.blur_prob),
        augmentation.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=COLOR.solarize_prob),
    ]
    rest = torch.nn.Sequential(augmentation.RandomHorizontalFlip(), *(color if photometrics else []), finish)
    views = [(many(side, area, number), rest) for number, side, area in FAMILIES]
    return Library(decode=decode_with_torchvision, cut=cut, views=views, antialias=False)


def decode_with_torchvision(encoded: NDArray[np.uint8]) -> Tensor:
    """Decode a file to (3, H, W) uint8, as torchvision does."""
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(torch.from_numpy(encoded), ImageReadMode.RGB)


def _jitter(transforms: Any) -> Any:
    return transforms.ColorJitter(COLOR.brightness, COLOR.contrast, COLOR.saturation, COLOR.hue)
