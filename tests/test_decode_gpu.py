"""Decoding JPEGs on a GPU without DALI, rehearsed on the CPU: torchvision's decoder, asked for the CPU, stands in for nvJPEG.

Compared with decode.py, and with what nvJPEG is known to get wrong, planted.
"""

import contextlib
import importlib.metadata
import io
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render import gpu_decode
from wherefrom.pipeline.render.decoder import Decoded
from wherefrom.pipeline.render.gpu_decode import (
    TensorDecoder,
    find_jpeg_decoder,
    gpu_decoder_missing,
    is_for_nvjpeg,
    make_decoder,
    without_exif,
)
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily, ViewRecipe

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")]

Bytes = NDArray[np.uint8]
CPU = torch.device("cpu")
NO_DALI = "NVIDIA DALI is not installed; pip install nvidia-dali-cuda130"


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, format: str = "JPEG", orientation: int = 1, **options: Any) -> Bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, format, exif=exif.tobytes() if orientation > 1 else b"", **options)
    return np.frombuffer(file.getvalue(), np.uint8)


JPEGS = [
    encoded(noise(40, 52, 0), quality=90),
    encoded(noise(44, 32, 1), quality=90, progressive=True, subsampling=0),
    encoded(noise(36, 60, 2).convert("L")),
    encoded(noise(32, 48, 3), orientation=6),
    encoded(Image.new("RGB", (1, 1), (200, 60, 90))),
]
OTHERS = [
    encoded(noise(40, 40, 4).convert("CMYK")),
    encoded(noise(40, 40, 5), keep_rgb=True, subsampling=0),
    encoded(noise(28, 36, 6), "PNG"),
    encoded(noise(28, 36, 7), "WEBP", lossless=True),
]
DAMAGED = JPEGS[0][: len(JPEGS[0]) // 2]


def pictures_of(decoded: Decoded) -> list[Bytes]:
    import ctypes

    shapes = [(int(height), int(width), 3) for height, width in decoded.sizes]
    memory = [
        (ctypes.c_uint8 * int(np.prod(shape))).from_address(address) for address, shape in zip(decoded.addresses, shapes, strict=True)
    ]
    return [np.ctypeslib.as_array(part).reshape(shape).copy() for part, shape in zip(memory, shapes, strict=True)]


def assert_pictures(decoded: Decoded, files: Sequence[Bytes]) -> None:
    """Assert that a batch shows what decode.py does; libjpeg-turbo is theirs and ours, in two versions."""
    for picture, file in zip(pictures_of(decoded), files, strict=True):
        expected = decode_picture(file)
        assert picture.shape == expected.shape
        assert np.abs(picture.astype(int) - expected).max() <= 3


class StandIn:
    """nvJPEG by torchvision's decoder on the CPU: planar pictures, all of a batch or none; it remembers what it was given and gave."""

    def __init__(self, skips: Callable[[int], bool] = lambda number: False) -> None:
        self.skips = skips  # pictures, by number, that it leaves as the memory is, and says nothing
        self.given: list[Bytes] = []
        self.gave: list[Tensor] = []

    def __call__(self, files: Sequence[Bytes], device: torch.device) -> list[Tensor]:
        self.given += files
        pictures = gpu_decode.decode_by_torchvision(files, device)
        pictures = [torch.zeros_like(picture) if self.skips(number) else picture for number, picture in enumerate(pictures)]
        self.gave += pictures
        return pictures


def test_a_mixed_batch_shows_what_the_cpu_decodes_and_lies_as_stored() -> None:
    files = [file for pair in zip(JPEGS, OTHERS, strict=False) for file in pair] + JPEGS[4:]
    nvjpeg = StandIn()
    decoder = TensorDecoder(device=CPU, threads=2, decode_jpegs=nvjpeg)
    decoded = decoder.decode(files)
    assert decoded.failed == {} and not decoder.strict
    assert_pictures(decoded, files)
    assert decoded.sizes[6].tolist() == [32, 48]  # on its side
    assert len(nvjpeg.given) == len(JPEGS) and all(file is given for file, given in zip(JPEGS, nvjpeg.given, strict=True))
    decoder.close()
    decoder.close()


def test_without_a_function_everything_is_decoded_strictly() -> None:
    decoder = TensorDecoder(device=CPU, threads=2)
    files = [*JPEGS, DAMAGED, *OTHERS]
    decoded = decoder.decode(files)
    assert decoder.strict and list(decoded.failed) == [5] and decoded.sizes[5].tolist() == [1, 1]
    assert_pictures(TensorDecoder(device=CPU).decode([*JPEGS, *OTHERS]), [*JPEGS, *OTHERS])


@pytest.mark.parametrize(("file", "serves"), [*((file, True) for file in JPEGS), *((file, False) for file in (*OTHERS, JPEGS[0][:9]))])
def test_nvjpeg_is_given_jpegs_of_gray_and_ycbcr_alone(file: Bytes, serves: bool) -> None:
    assert is_for_nvjpeg(file) == serves


def test_a_refused_batch_is_decoded_on_the_cpu_and_the_next_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    nvjpeg = StandIn()

    def refuses(files: Sequence[Bytes], device: torch.device) -> list[Tensor]:
        if any(len(file) == len(DAMAGED) for file in files):
            raise RuntimeError("Error while decoding JPEG images: Failed to decode batch: 3\nException raised from ...")
        return nvjpeg(files, device)

    decoder = TensorDecoder(device=CPU, threads=2, decode_jpegs=refuses)
    with caplog.at_level("INFO"):
        for _ in range(2):
            decoded = decoder.decode([JPEGS[0], DAMAGED, *JPEGS[1:]])
            assert list(decoded.failed) == [1] and decoded.failed[1] and "\n" not in decoded.failed[1]
            assert not nvjpeg.given
    assert caplog.text.count("refuses a batch") == 1 and "Exception raised from" not in caplog.text
    pictures = pictures_of(decoded)
    for picture, file in zip([pictures[0], *pictures[2:]], JPEGS, strict=True):
        np.testing.assert_array_equal(picture, decode_picture(file))
    assert_pictures(decoder.decode(JPEGS), JPEGS)
    assert len(nvjpeg.given) == len(JPEGS)


def test_a_gpu_that_is_full_is_no_refusal() -> None:
    def full(files: Sequence[Bytes], device: torch.device) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        TensorDecoder(device=CPU, decode_jpegs=full).decode(JPEGS)


def test_a_picture_that_the_hardware_skips_is_not_shown_black() -> None:
    black = encoded(Image.new("RGB", (24, 20)))
    files = [*JPEGS, black, DAMAGED]

    def lenient(files: Sequence[Bytes], device: torch.device) -> list[Tensor]:
        return [*StandIn(skips=lambda number: number in (1, 3))(files[:-1], device), torch.zeros(3, 40, 52, dtype=torch.uint8)]

    decoded = TensorDecoder(device=CPU, threads=2, decode_jpegs=lenient).decode(files)
    assert list(decoded.failed) == [6]
    for picture, file in zip(pictures_of(decoded)[:6], files[:6], strict=True):
        assert np.abs(picture.astype(int) - decode_picture(file)).max() <= 3
    assert pictures_of(decoded)[5].max() == 0  # as it is


def test_memory_goes_back_black_so_that_what_is_skipped_is_no_older_picture() -> None:
    nvjpeg = StandIn()
    decoded = TensorDecoder(device=CPU, decode_jpegs=nvjpeg).decode(JPEGS)
    assert len(nvjpeg.gave) == len(JPEGS) and not any(picture.any() for picture in nvjpeg.gave)
    assert_pictures(decoded, JPEGS)


def test_without_exif_a_jpeg_shows_the_same_and_says_nothing_of_how_it_lies() -> None:
    assert Image.open(io.BytesIO(JPEGS[3].tobytes())).getexif()[0x0112] == 6
    stripped = without_exif(JPEGS[3])
    assert not Image.open(io.BytesIO(stripped.tobytes())).getexif()
    assert int((stripped != JPEGS[3]).sum()) == 4  # "Exif"
    np.testing.assert_array_equal(decode_picture(stripped), decode_picture(JPEGS[3]))
    np.testing.assert_array_equal(without_exif(JPEGS[0]), JPEGS[0])


def test_no_bytes_whatever_keep_exif_from_being_looked_for() -> None:
    random = np.random.default_rng(0)
    for length in (0, 1, 2, 9, 12, 40, 400):
        for _ in range(20):
            file = np.concatenate([np.array([0xFF, 0xD8, 0xFF, 0xE1], np.uint8), random.integers(0, 256, length, np.uint8)])
            assert len(without_exif(file)) == len(file)


def test_torchcodec_is_told_nothing_of_an_orientation_which_it_would_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def decode_jpeg(source: list[Tensor], *, mode: str, device: torch.device) -> list[Tensor]:
        calls.append((mode, device))
        images = [Image.open(io.BytesIO(file.numpy().tobytes())) for file in source]
        assert not any(image.getexif() for image in images)
        return [torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).contiguous() for image in images]

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(decode_jpeg=decode_jpeg))
    decoder = TensorDecoder(device=CPU, decode_jpegs=gpu_decode.decode_by_torchcodec)
    assert_pictures(decoder.decode(JPEGS), JPEGS)
    assert calls == [("RGB", CPU)]


@pytest.mark.parametrize(
    ("release", "taken"), [("0.16.0", True), ("0.17.0+cu130", True), ("1.0.0a0", True), ("0.15.1", False), (None, False)]
)
def test_torchcodec_is_taken_before_torchvision_if_it_decodes_pictures(
    release: str | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if release is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("torchvision.version.cuda", "13000")
    assert list(gpu_decode.jpeg_libraries()) == (["torchcodec", "torchvision"] if taken else ["torchvision"])


def libraries(monkeypatch: pytest.MonkeyPatch, **decoders: Any) -> None:
    monkeypatch.setattr(gpu_decode, "jpeg_libraries", lambda: decoders)


def test_a_library_serves_once_it_has_been_seen_to_decode(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuses(files: Sequence[Bytes], device: torch.device) -> list[Tensor]:
        raise RuntimeError("torchcodec was built without nvJPEG\nException raised from ...")

    def shows_black(files: Sequence[Bytes], device: torch.device) -> list[Tensor]:
        return [torch.zeros(3, 64, 96, dtype=torch.uint8)]

    nvjpeg = gpu_decode.decode_by_torchvision
    libraries(monkeypatch, torchcodec=refuses, other=shows_black, torchvision=nvjpeg)
    with caplog.at_level("INFO"):
        assert find_jpeg_decoder(CPU) is nvjpeg
    assert "JPEGs are decoded on the GPU by torchvision" in caplog.text
    libraries(monkeypatch, torchcodec=refuses, other=shows_black)
    message = (
        "^no JPEG is decoded on cpu: torchcodec: torchcodec was built without nvJPEG; other: it shows another picture than it was given; "
        'or use renderer="torch"$'
    )
    with pytest.raises(ValueError, match=message):
        find_jpeg_decoder(CPU)


def test_dali_decodes_where_it_is_and_without_any_decoder_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(gpu_decode, "dali_missing", lambda: None)
    monkeypatch.setattr(gpu_decode, "DaliDecoder", lambda **options: made.append("dali"))
    libraries(monkeypatch)
    assert gpu_decoder_missing() is None
    make_decoder(torch.device("cuda"))
    assert made == ["dali"]
    monkeypatch.setattr(gpu_decode, "dali_missing", lambda: NO_DALI)
    missing = gpu_decoder_missing()
    assert missing is not None
    assert missing.startswith("nothing here decodes JPEGs on a GPU; pip install nvidia-dali-cuda130, torchcodec>=0.16 or")
    with pytest.raises(ValueError, match=f'no JPEG is decoded on cuda: {missing}; or use renderer="torch"$'):
        make_decoder(torch.device("cuda"))
    libraries(monkeypatch, torchvision=gpu_decode.decode_by_torchvision)
    assert gpu_decoder_missing() is None


def test_the_triton_renderer_shows_the_same_behind_this_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without DALI, in Triton's interpreter: the record undoes EXIF, the decoder does not."""
    pytest.importorskip("triton")
    from wherefrom.pipeline.render.triton_renderer import TritonRenderer

    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    family = ViewFamily(name="one", views=2, size_px=(9, 12), mirror="view", turns=True, color=ColorLaw(), snap="none", min_side_px=4)
    recipe = ViewRecipe(families=(family,))
    files, orientations = [JPEGS[0], JPEGS[3], OTHERS[2]], np.array([1, 6, 1], np.uint8)
    sizes = np.array([decode_picture(file, int(orientation)).shape[:2] for file, orientation in zip(files, orientations, strict=True)])
    records = draw_records(
        recipe, seed=5, epoch=0, drawn_for=np.arange(3), source_size=sizes.astype(np.int32), stored_orientation=orientations
    )
    nvjpeg = StandIn()
    decoders = (TensorDecoder(device=CPU), TensorDecoder(device=CPU, decode_jpegs=nvjpeg))
    ours, theirs = (TritonRenderer(recipe, device="cpu", decoder=decoder) for decoder in decoders)
    expected, shown = ours.render(files, records), theirs.render(files, records)
    assert (ours.strict, theirs.strict) == (True, False) and len(nvjpeg.given) == 2
    assert expected.failed == shown.failed == {}
    torch.testing.assert_close(shown.pixels[0], expected.pixels[0], rtol=0, atol=3 / 255 / 0.22)
    bad = theirs.render([DAMAGED, files[0], files[2]], records)
    assert sorted(bad.failed) == [0, 1]  # refused; of another size than its record says
    assert "its record says" in bad.failed[1]


def test_a_stream_is_idle_when_work_on_it_ends_also_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    stream: Any = SimpleNamespace(synchronize=lambda: events.append("idle"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for error in (None, RuntimeError):
        with contextlib.suppress(RuntimeError), gpu_decode._on_stream(stream):
            events.append("work")
            if error is not None:
                raise error
    assert events == ["work", "idle"] * 2
