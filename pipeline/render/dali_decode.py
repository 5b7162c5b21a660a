"""Decoding by NVIDIA DALI, for renderers that cut on a GPU.

Here: whether DALI is there, the files that it may be given, its decoder. DALI is imported when one is made, not before.
Not here: cutting views (dali_renderer.py, triton_renderer.py), decoders without DALI (gpu_decode.py), strict decoding on a CPU (decode.py).
"""

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wherefrom.pipeline.decode import decode_or_stand_in, is_jpeg
from wherefrom.pipeline.render.decoder import Decoded
from wherefrom.pipeline.system import cores_of_rank


def dali_missing() -> str | None:
    """Return why DALI is not there, or None; it is not imported."""
    if importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None:
        return None
    return "NVIDIA DALI is not installed; pip install nvidia-dali-cuda130"


def decoded_pictures(encoded: Sequence[NDArray[np.uint8]], pool: ThreadPoolExecutor) -> tuple[list[NDArray[np.uint8]], dict[int, str]]:
    """Decode files strictly, as every CPU renderer does: pictures as stored, and position -> reason where one gray pixel stands in."""
    decoded = list(pool.map(decode_or_stand_in, encoded))
    return [picture for picture, _ in decoded], {i: reason for i, (_, reason) in enumerate(decoded) if reason}


def readable_files(
    encoded: Sequence[NDArray[np.uint8]], pool: ThreadPoolExecutor, *, decode_jpegs: bool
) -> tuple[list[NDArray[np.uint8]], dict[int, str]]:
    """Return files for DALI's decoder, and position -> reason for those that will not decode, where one gray pixel stands in.

    JPEGs stay as they are; everything else is decoded here and becomes PNM, so that all renderers refuse the same and show the same. With
    `decode_jpegs` JPEGs do too: for a batch that DALI refused, whose verdict on each picture is then the strict one.
    """
    ours = [i for i, file in enumerate(encoded) if decode_jpegs or not is_jpeg(file)]
    pictures, failed = decoded_pictures([encoded[i] for i in ours], pool)
    files = list(encoded)
    for i, picture in zip(ours, pictures, strict=True):
        head = np.frombuffer(b"P6\n%d %d\n255\n" % (picture.shape[1], picture.shape[0]), np.uint8)
        files[i] = np.concatenate([head, picture.ravel()])
    return files, {ours[k]: reason for k, reason in failed.items()}


def decoded_by_dali(name: str, gpu: bool, hw_decoder_load: float) -> Any:
    """Add to a graph: the files fed under a name, decoded; EXIF is not undone, for the record says how the picture lies."""
    from nvidia.dali import fn, types

    file = fn.external_source(name=name, dtype=types.UINT8, ndim=1)
    decoding = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if gpu else {"device": "cpu"}
    return fn.decoders.image(file, jpeg_fancy_upsampling=True, adjust_orientation=False, **decoding)


class DaliDecoder:
    """Decodes JPEGs with NVIDIA DALI, to the GPU or, for tests, to the CPU; pictures keep their stored orientation."""

    strict = False

    def __init__(self, *, device: torch.device, threads: int | None = None, hw_decoder_load: float = 0.65) -> None:
        self.device = device
        self.threads = cores_of_rank() if threads is None else max(1, threads)
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
