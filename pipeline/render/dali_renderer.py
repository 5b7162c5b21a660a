"""The `dali` renderer: one DALI graph for CPU and GPU that cuts all views of a picture that was decoded once.

Here: the graph, feeding it records and pictures. Pixels are float32 from resize to hand-over. On a CPU decode.py decodes, strictly; a GPU
decodes JPEGs itself, which is never strict, and is asked for nothing else: `readable_files` is what it is given.
Not here: drawing (DALI's own random operators are never used), reading. DALI is imported when a renderer is made, not before.
Convention: DALI's regions are (y, x), floats, absolute; an end before its start mirrors that axis.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.render.dali_decode import dali_missing, decoded_by_dali, decoded_pictures, readable_files
from wherefrom.pipeline.render.renderer import Rendered, Renderer, RendererEntry, leaves_picture, wrong_sizes
from wherefrom.pipeline.system import cores_of_rank
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Photometric, Record


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    """What the graph does to one family's views after cutting and resizing them."""

    turn: bool
    color: bool
    blur: bool
    solarize: bool

    @staticmethod
    def of_family(family: ViewFamily) -> "_Steps":
        law = family.color
        return _Steps(
            turn=family.turns,
            color=law is not None,
            blur=law is not None and law.blur_prob > 0,
            solarize=law is not None and law.solarize_prob > 0,
        )

    @staticmethod
    def of_record(record: Record) -> "_Steps":
        geometry, photometric = record.geometry, record.photometric
        same = Photometric.unchanged(*geometry.flipped.shape)
        names = ("brightness", "contrast", "saturation", "hue_rad", "gray")
        return _Steps(
            turn=bool(geometry.quarter_turns.any()),
            color=any(not torch.equal(getattr(photometric, name), getattr(same, name)) for name in names),
            blur=bool(photometric.blur_sigma_px.any()),
            solarize=bool(photometric.solarized.any()),
        )

    def __or__(self, other: "_Steps") -> "_Steps":
        return _Steps(
            turn=self.turn or other.turn,
            color=self.color or other.color,
            blur=self.blur or other.blur,
            solarize=self.solarize or other.solarize,
        )


class DaliRenderer:
    """Renders batches with NVIDIA DALI, on a GPU or on the CPU; its pixels equal the float64 reference's to 0.001 levels mean.

    A batch takes up to three times the memory of its float32 views while it is rendered. `max_batch` only spares the rebuilding (about
    0.1 s) that the first larger batch brings, or the first picture that lies on its side.
    Raises: ValueError if DALI is not installed, or for a device that is neither cpu nor cuda.
    """

    name = "dali"

    def __init__(
        self,
        recipe: ViewRecipe,
        *,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        max_batch: int | None = None,
        hw_decoder_load: float = 0.65,  # share of JPEGs that a GPU's hardware decoder takes, where it has one
        strict: bool | None = None,  # None: on a CPU; True decodes JPEGs on the CPU for a GPU too
        exact: bool = True,  # False keeps 8 bits after the resize: 1.25 times as fast on a CPU, where make_renderer asks for it
    ) -> None:
        if missing := dali_missing():
            raise ValueError(f'renderer "dali" cannot run: {missing}; or use renderer="auto"')
        self.recipe = recipe
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f'device={str(device)!r}: renderer "dali" runs on "cpu" or "cuda"; use renderer="torch"')
        if self.device == torch.device("cuda"):
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.threads = cores_of_rank() if threads is None else max(1, threads)
        self.hw_decoder_load = hw_decoder_load
        self.strict = self.device.type == "cpu" if strict is None else strict
        self.exact = exact
        self._max_batch = max_batch or 1
        self._steps = tuple(_Steps.of_family(family) for family in recipe.families)
        self._lying = False  # whether a picture has come whose EXIF orientation exchanges its sides
        self._pipeline: Any = None  # built on first use, again when a batch is larger or needs more steps, or after a failure
        self._pool: ThreadPoolExecutor | None = None  # decodes
        self._lock = threading.Lock()

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[Record]) -> Rendered:
        """Render a batch; pictures that will not decode, or whose size is not the record's, are named in `failed`.

        Shapes: B encoded files, one record (B, V, ...) a family -> one (B, V, 3, H, W) a family, on the renderer's device.
        Raises: RuntimeError if DALI fails although every picture decodes.
        """
        if not encoded:  # DALI has no batches of none
            nothing = [torch.empty(0, f.views, 3, *f.size_px, dtype=getattr(torch, self.recipe.pixels)) for f in self.recipe.families]
            return Rendered(pixels=tuple(pixels.to(self.device) for pixels in nothing), failed={})
        source_size, lying = records[0].geometry.source_size.numpy(), records[0].geometry.stored_orientation.numpy() >= 5
        arrays = [_input_arrays(record) for record in records]
        started = time.perf_counter()
        pool = self._decoding_pool()
        pictures, failed = decoded_pictures(encoded, pool) if self.strict else readable_files(encoded, pool, decode_jpegs=False)
        decode_s = time.perf_counter() - started
        with self._lock:
            started = time.perf_counter()
            steps = tuple(mine | _Steps.of_record(record) for mine, record in zip(self._steps, records, strict=True))
            if steps != self._steps or len(encoded) > self._max_batch or lying.any() > self._lying:
                self._steps, self._max_batch, self._pipeline = steps, max(len(encoded), self._max_batch), None
                self._lying |= bool(lying.any())
            try:
                upright_size, pixels = self._run(pictures, source_size, lying, arrays)
            except RuntimeError:
                self._pipeline = None  # one undecodable picture ends a DALI pipeline
                if self.strict:
                    raise
                pictures, failed = readable_files(encoded, pool, decode_jpegs=True)
                upright_size, pixels = self._run(pictures, source_size, lying, arrays)
            render_s = decode_s + time.perf_counter() - started
        return Rendered(pixels=pixels, failed=wrong_sizes(upright_size, source_size) | failed, render_s=render_s)

    def close(self) -> None:
        """Free threads and memory; twice is fine."""
        with self._lock:
            self._pipeline = None
            if self._pool is not None:
                self._pool.shutdown(wait=True)
                self._pool = None

    def _decoding_pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, "wherefrom-decode")
            return self._pool

    def _run(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        source_size: NDArray[np.int32],
        lying: NDArray[np.bool_],
        arrays: list[dict[str, NDArray[Any]]],
    ) -> tuple[NDArray[np.int32], tuple[Tensor, ...]]:
        """Return the pictures' upright sizes (B, 2) and one (B, V, 3, H, W) a family. `pictures` are decoded if strict, files if not."""
        if self._pipeline is None:
            self._pipeline = self._build()
        self._pipeline.feed_input("pictures", list(pictures), layout="HWC" if self.strict else None)
        self._pipeline.feed_input("source_size", source_size)
        if self._lying:
            self._pipeline.feed_input("lying", lying.astype(np.int32))
        for number, (steps, of_family) in enumerate(zip(self._steps, arrays, strict=True)):
            for name in _inputs(steps):
                self._pipeline.feed_input(f"{name}{number}", of_family[name])
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        upright_size, *pixels = self._pipeline.run(stream)
        return np.array(upright_size.as_array()), tuple(torch.from_dlpack(views.as_tensor()) for views in pixels)

    def _build(self) -> Any:
        """Return the pipeline: pictures decoded once or given, each family's views cut, then treated together as frames of one sequence."""
        from nvidia.dali import fn, pipeline_def, types

        cuts = list(enumerate(zip(self.recipe.families, self._steps, strict=True)))

        @pipeline_def(
            batch_size=self._max_batch,
            num_threads=self.threads,
            device_id=self.device.index,
            prefetch_queue_depth=1,
            enable_conditionals=self._lying or any(steps.turn for steps in self._steps),
        )
        def graph() -> Any:
            picture = self._picture()
            if self._lying:  # noqa: SIM102 - asked once, while the graph is built; the next is asked for every sample
                if fn.external_source(name="lying", dtype=types.INT32, ndim=0) > 0:
                    picture = fn.transpose(picture, perm=[1, 0, 2], transpose_layout=False)
            extent = fn.cast(picture.shape()[0:2], dtype=types.INT32)
            fits, whole = _fit_of_record(extent)
            finished = []
            for number, (family, steps) in cuts:
                inputs = {
                    name: fn.external_source(name=f"{name}{number}", dtype=types.INT32 if integer else types.FLOAT, ndim=ndim)
                    for name, (ndim, integer) in _inputs(steps).items()
                }
                region = inputs["region"] * fits + whole * (1 - fits)
                frames = self._cut(picture, region, inputs, family, steps)
                finished.append(self._finished(_recolor(frames, inputs, steps, self.device.type == "cuda")))
            return extent, *finished

        pipeline = graph()
        pipeline.build()
        return pipeline

    def _picture(self) -> Any:
        """Add to the graph: the picture, fed decoded if strict, else decoded here."""
        from nvidia.dali import fn, types

        on_gpu = self.device.type == "cuda"
        if not self.strict:
            return decoded_by_dali("pictures", on_gpu, self.hw_decoder_load)
        picture = fn.external_source(name="pictures", dtype=types.UINT8, ndim=3)
        return picture.gpu() if on_gpu else picture

    def _cut(self, picture: Any, region: Any, inputs: dict[str, Any], family: ViewFamily, steps: _Steps) -> Any:
        """Add to the graph: one family's views of a picture, cut by `region` (V, 4), resized and turned, as frames (V, h, w, 3)."""
        from nvidia.dali import fn, types

        eight_bits = not self.exact or (self.recipe.pixels == "uint8" and family.color is None)  # then nothing is rounded twice
        resized = types.UINT8 if eight_bits else types.FLOAT
        views = []
        for v in range(family.views):
            size = inputs["size"][v] if steps.turn else family.size_px
            view = fn.resize(picture, roi_start=region[v, 0:2], roi_end=region[v, 2:4], size=size, dtype=resized)
            if steps.turn:  # noqa: SIM102 - asked once, while the graph is built; the next is asked for every sample
                if inputs["transposed"][v] > 0:
                    view = fn.transpose(view, perm=[1, 0, 2], transpose_layout=False)
            views.append(view)
        return fn.stack(*views, axis=0, axis_name="F")

    def _finished(self, frames: Any) -> Any:
        """Add to the graph: frames normalized, cast and planar."""
        from nvidia.dali import fn, types

        recipe = self.recipe
        output_type = {"uint8": types.UINT8, "float16": types.FLOAT16, "float32": types.FLOAT}[recipe.pixels]
        scaling = {} if recipe.pixels == "uint8" else {"mean": [255 * m for m in recipe.mean], "std": [255 * s for s in recipe.std]}
        return fn.crop_mirror_normalize(frames, dtype=output_type, output_layout="FCHW", **scaling)


def _fit_of_record(extent: Any) -> tuple[Any, Any]:
    """Add to the graph: 1.0 if a picture has its record's size, else 0.0; and the region that is the whole picture.

    Another size is found out after the run; until then no region may lead far outside: DALI 2.4 crashes there.
    """
    from nvidia.dali import fn, types

    recorded = fn.external_source(name="source_size", dtype=types.INT32, ndim=1)
    fits = fn.cast((extent[0] == recorded[0]) & (extent[1] == recorded[1]), dtype=types.FLOAT)
    return fits, fn.cast(fn.cat(extent * 0, extent), dtype=types.FLOAT)


def _recolor(frames: Any, inputs: dict[str, Any], steps: _Steps, on_gpu: bool) -> Any:
    """Add one family's color to the graph: matrix and clip, blur, solarize; frames are its views, (V, h, w, 3)."""
    from nvidia.dali import fn, math, types

    if steps.color:
        frames = fn.coord_transform(frames, MT=fn.per_frame(inputs["matrix"]), dtype=types.FLOAT)
        frames = math.min(math.max(frames, 0.0), 255.0)
    if steps.blur:
        sigma, window = fn.per_frame(inputs["sigma"]), fn.per_frame(inputs["window"])
        frames = fn.gaussian_blur(frames, sigma=sigma, window_size=window, dtype=types.FLOAT)
    if steps.solarize:
        top = inputs["top"].gpu() if on_gpu else inputs["top"]
        frames = math.min(frames, math.abs(frames - top))  # top is 255, or 0: min(x, |x|) is x
    return frames


def _inputs(steps: _Steps) -> dict[str, tuple[int, bool]]:
    """Return what a family's graph is fed, name -> (axes of one sample, whether integers)."""
    names: dict[str, tuple[int, bool]] = {"region": (2, False)}
    if steps.turn:
        names |= {"size": (2, False), "transposed": (1, True)}
    if steps.color:
        names |= {"matrix": (3, False)}
    if steps.blur:
        names |= {"sigma": (1, False), "window": (1, True)}
    if steps.solarize:
        names |= {"top": (4, False)}
    return names


def _input_arrays(record: Record) -> dict[str, NDArray[Any]]:
    """Return a record as the arrays of `_inputs`, the first axis B.

    A view is cut by a region that mirrors either axis, then transposed if its turn is odd: a mirror and four turns are no more than that.
    What is left to undo of EXIF once a picture that lies on its side is transposed mirrors the region again.
    Raises: ValueError if a box leaves its picture.
    """
    geometry, photometric = record.geometry, record.photometric
    flipped, turns = geometry.flipped.numpy(), geometry.quarter_turns.numpy() % 4
    odd = turns % 2 == 1
    mirrored_x, mirrored_y = flipped ^ ((turns == 1) | (turns == 2)), turns >= 2
    x0, y0, x1, y1 = np.moveaxis(geometry.boxes.numpy(), -1, 0)
    inside = (x0 >= 0) & (y0 >= 0) & (x1 <= geometry.source_size[:, 1:].numpy()) & (y1 <= geometry.source_size[:, :1].numpy())
    if not inside.all():  # nan is nowhere
        raise leaves_picture(geometry, *np.argwhere(~inside)[0].tolist())
    x0, y0, x1, y1 = (edge.astype(np.float64) for edge in (x0, y0, x1, y1))  # float32 would round what is mirrored
    stored, whole = geometry.stored_orientation.numpy()[:, None], geometry.source_size.numpy()
    across, down = np.isin(stored, (2, 3, 6, 7)), np.isin(stored, (3, 4, 7, 8))
    x0, x1 = (np.where(across, whole[:, 1:] - x, x) for x in (x0, x1))
    y0, y1 = (np.where(down, whole[:, :1] - y, y) for y in (y0, y1))
    height, width = geometry.size_px
    sigma = photometric.blur_sigma_px.numpy()
    region = [
        np.where(mirrored_y, y1, y0),
        np.where(mirrored_x, x1, x0),
        np.where(mirrored_y, y0, y1),
        np.where(mirrored_x, x0, x1),
    ]
    return {
        "region": np.stack(region, -1).astype(np.float32),
        "size": np.stack([np.where(odd, width, height), np.where(odd, height, width)], -1).astype(np.float32),
        "transposed": odd.astype(np.int32),
        "matrix": color_matrix(photometric).float().numpy(),
        "sigma": sigma,
        "window": (2 * np.ceil(3 * sigma.astype(np.float64)) + 1).astype(np.int32),
        "top": np.where(photometric.solarized.numpy(), np.float32(255), np.float32(0))[..., None, None, None],
    }


def _make(recipe: ViewRecipe, *, device: str | torch.device, threads: int | None, prefetch: int) -> Renderer:
    # on a CPU, 8 bits after the resize make the whole a quarter faster; on a GPU floats are not what takes the time
    return DaliRenderer(recipe, device=device, threads=threads, exact=torch.device(device).type == "cuda")


ENTRY = RendererEntry(
    devices=("cpu", "cuda"),
    snaps=("pixel", "none"),
    make=_make,
    missing=dali_missing,
    variants={("cpu", "exact=True"): partial(DaliRenderer, device="cpu", exact=True)},
    auto={"cuda": 1},
    why="decodes and resizes on the GPU",
)
