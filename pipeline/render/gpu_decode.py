"""Decoding JPEGs on a GPU with or without DALI: which decoder serves, and the one that PyTorch's own libraries make.

Here: DALI where it is installed, else torchcodec, else torchvision; what their nvJPEG must not be given, and where it cannot be trusted.
Not here: DALI's decoder (dali_decode.py), the strict decoding of one file on a CPU (decode.py).
Convention: files are (bytes,) uint8; the libraries return planar (3, H, W), decoders hand on (H, W, 3), both RGB uint8 as stored.
"""

import contextlib
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.decode import decode_or_stand_in
from wherefrom.pipeline.render.dali_decode import DaliDecoder, dali_missing
from wherefrom.pipeline.render.decoder import Decoded, Decoder
from wherefrom.pipeline.system import cores_of_rank

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]
DecodeJpegs = Callable[[Sequence[Bytes], torch.device], list[Tensor]]

TORCHCODEC = (0, 16)  # the first that decodes JPEGs on a GPU
_PROBE_COLOR, _PROBE_SIZE, _PROBE_ERROR = (200, 60, 90), (64, 96), 16  # RGB, (height, width), levels


def gpu_decoder_missing() -> str | None:
    """Return why nothing here decodes JPEGs on a GPU, or None. No GPU is looked for."""
    if dali_missing() is None or jpeg_libraries():
        return None
    return "nothing here decodes JPEGs on a GPU; pip install nvidia-dali-cuda130, torchcodec>=0.16 or a torchvision built for CUDA"


def make_decoder(device: torch.device, threads: int | None = None) -> Decoder:
    """Build the decoder that serves a GPU: DALI, else torchcodec, else torchvision. On a CPU, for Triton's interpreter, decode.py serves.

    Raises: ValueError in one line if there is none, or none of those that are installed decodes a JPEG there.
    """
    if device.type == "cpu":
        return TensorDecoder(device=device, threads=threads)
    if dali_missing() is None:
        return DaliDecoder(device=device, threads=threads)
    return TensorDecoder(device=device, threads=threads, decode_jpegs=find_jpeg_decoder(device))


def find_jpeg_decoder(device: torch.device) -> DecodeJpegs:
    """Return the first of torchcodec and torchvision that decodes a JPEG on a device, having seen it do so, and say which.

    Raises: ValueError in one line if neither is there or does.
    """
    probe = np.frombuffer(simplejpeg.encode_jpeg(np.full((*_PROBE_SIZE, 3), _PROBE_COLOR, np.uint8)), np.uint8)
    refusals = []
    for name, decode_jpegs in jpeg_libraries().items():
        try:
            with _on_stream(torch.cuda.Stream(device) if device.type == "cuda" else None):  # as every batch later, for the same reason
                [picture] = decode_jpegs([probe], device)
        except (ImportError, OSError, RuntimeError) as refusal:
            refusals.append(f"{name}: {str(refusal).partition(chr(10))[0]}")
            continue
        off = picture.cpu().int() - torch.tensor(_PROBE_COLOR)[:, None, None]
        if off.shape == (3, *_PROBE_SIZE) and off.abs().max() <= _PROBE_ERROR:
            log.info("JPEGs are decoded on the GPU by %s", name)
            return decode_jpegs
        refusals.append(f"{name}: it shows another picture than it was given")
    raise ValueError(f'no JPEG is decoded on {device}: {"; ".join(refusals) or gpu_decoder_missing()}; or use renderer="torch"')


def jpeg_libraries() -> dict[str, DecodeJpegs]:
    """Return what is installed that decodes JPEGs on a GPU, in the order of preference."""
    libraries: dict[str, DecodeJpegs] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        major, minor = importlib.metadata.version("torchcodec").split(".")[:2]
        if (int(major), int(minor)) >= TORCHCODEC:
            libraries["torchcodec"] = decode_by_torchcodec
    with contextlib.suppress(ImportError):
        import torchvision

        if torchvision.version.cuda is not None:
            libraries["torchvision"] = decode_by_torchvision
    return libraries


def decode_by_torchcodec(encoded: Sequence[Bytes], device: torch.device) -> list[Tensor]:
    """Decode JPEGs of gray or YCbCr to planar RGB by torchcodec; on a GPU, on a stream that nobody else uses (see `TensorDecoder`)."""
    decoders: Any = importlib.import_module("torchcodec.decoders")  # a library that we declare nowhere
    return list(decoders.decode_jpeg([torch.from_numpy(without_exif(file)) for file in encoded], mode="RGB", device=device))


def decode_by_torchvision(encoded: Sequence[Bytes], device: torch.device) -> list[Tensor]:
    """Decode JPEGs of gray or YCbCr to planar RGB by torchvision; on a GPU, on a stream that nobody else uses (see `TensorDecoder`)."""
    from torchvision import io  # TODO: drop once torchvision has no decoders, as 0.29 announces

    files = [torch.from_numpy(file if file.flags.writeable else file.copy()) for file in encoded]
    return list(io.decode_jpeg(files, mode=io.ImageReadMode.RGB, device=device))


def without_exif(file: Bytes) -> Bytes:
    """Return a copy of a JPEG in which no EXIF is recognized: torchcodec undoes an orientation unasked, and who renders does so again.

    Source: ITU-T T.81, B.1.1 (a marker, a length that counts itself, a body); Exif 3.0, 4.7.2.
    """
    copy, at = file.copy(), 2
    while at + 10 <= len(copy) and copy[at] == 0xFF and copy[at + 1] not in (0xD9, 0xDA):  # the end, a scan
        if copy[at + 1] == 0xE1 and copy[at + 4 : at + 10].tobytes() == b"Exif\0\0":
            copy[at + 4 : at + 10] = 0
        at += 2 + max(2, int(copy[at + 2]) << 8 | int(copy[at + 3]))
    return copy


class TensorDecoder:
    """Decodes to tensors on a device: JPEGs by a function if one is given, everything else by decode.py, strictly, and copied.

    What the function refuses is decoded by decode.py with the rest of its batch, and so is what it leaves black.
    """

    def __init__(self, *, device: torch.device, threads: int | None = None, decode_jpegs: DecodeJpegs | None = None) -> None:
        self.device = device
        self.strict = decode_jpegs is None
        self._decode_jpegs = decode_jpegs
        self._pool = ThreadPoolExecutor(cores_of_rank() if threads is None else max(1, threads), "wherefrom-decode")
        on_gpu = device.type == "cuda"
        self._decoding: torch.cuda.Stream | None = torch.cuda.Stream(device) if on_gpu else None
        self._copying: torch.cuda.Stream | None = torch.cuda.Stream(device) if on_gpu else None
        self._refused = False  # whether a batch was, and it was said

    def decode(self, encoded: Sequence[Bytes]) -> Decoded:
        """Decode a batch of at least one file; the pictures are there when it returns.

        They lie in memory of a stream that never waits: hold them until the GPU has read them, `owner` does.
        """
        pictures = self._decode_on_device(encoded)
        failed = {}
        rest = [i for i in range(len(encoded)) if i not in pictures]
        arrays = self._pool.map(decode_or_stand_in, [encoded[i] for i in rest])
        with _on_stream(self._copying):
            for i, (array, reason) in zip(rest, arrays, strict=True):
                pictures[i] = torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)
                if reason:
                    failed[i] = reason
        return Decoded(
            owner=pictures,
            addresses=[pictures[i].data_ptr() for i in range(len(encoded))],
            sizes=np.array([pictures[i].shape[:2] for i in range(len(encoded))], np.int32),
            failed=failed,
        )

    def close(self) -> None:
        """End the threads; twice is fine."""
        self._pool.shutdown(wait=True)

    def _decode_on_device(self, encoded: Sequence[Bytes]) -> dict[int, Tensor]:
        """Return position -> picture (H, W, 3) for the JPEGs that the function shows.

        nvJPEG does not wait for what is queued on the GPU. The allocator takes a block for free once the kernels that read it are queued,
        and nvJPEG would write into it before they run. So it has a stream to itself, which shares no memory and is idle when it begins.
        Its hardware may skip a picture and say nothing. So that memory goes back zeroed: what is skipped is black, no older picture.
        Source: pytorch/vision 9606 and meta-pytorch/torchcodec 1634 (written too early); MrNeRF/LichtFeld-Studio 1924 (skipped).
        """
        positions = [] if self._decode_jpegs is None else [i for i, file in enumerate(encoded) if is_for_nvjpeg(file)]
        if self._decode_jpegs is None or not positions:
            return {}
        try:
            with _on_stream(self._decoding):
                planar = self._decode_jpegs([encoded[i] for i in positions], self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refusal:  # of one picture; it is not said which
            if not self._refused:
                self._refused = True
                log.info("the GPU's decoder refuses a batch, which is decoded on the CPU: %s", str(refusal).partition("\n")[0])
            return {}
        with _on_stream(self._copying):
            # copied in any case: of one pixel, or where a library made it so, a picture is contiguous already
            pictures = [picture.permute(1, 2, 0).clone(memory_format=torch.contiguous_format) for picture in planar]
            middle_rows = [picture[:, picture.shape[1] // 2].flatten() for picture in planar]
            levels = torch.cat(middle_rows).cpu().numpy()
            for picture in planar:
                picture.zero_()
        starts = np.cumsum([0, *(len(row) for row in middle_rows)])[:-1]
        written = np.maximum.reduceat(levels, starts) > 0  # false for a black row too, which costs no more than a decode
        return {i: picture for i, picture, shows in zip(positions, pictures, written.tolist(), strict=True) if shows}


def is_for_nvjpeg(file: Bytes) -> bool:
    """Return whether a file is a JPEG of colors that nvJPEG shows as decode.py does: gray or YCbCr, not RGB or inks."""
    try:
        *_, colors, _ = simplejpeg.decode_jpeg_header(file, strict=True)
    except (ValueError, KeyError):
        return False
    return colors in ("Gray", "YCbCr")


@contextlib.contextmanager
def _on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a stream until it is done; on a CPU just work."""
    if stream is None:
        yield
        return
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()
