"""Decoding no more of a JPEG than its views read: bit for bit what the whole gives, or the whole is decoded, and no verdict changes.

The truth is simplejpeg's strict decoding of the whole. Memory safety: test_native_safety.py.
"""

import io
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from jpeg_files import RESTARTS, SAMPLINGS, Bytes, by_pillow, jpeg_of, kinds, picture_of
from numpy.typing import NDArray
from PIL import Image

from wherefrom.kernels.render_views import decode_part, native_missing, open_jpeg
from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.laws import Center, Independent
from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.proof.prove import ProofCase, prove
from wherefrom.pipeline.records import draw_records, shown_frac
from wherefrom.pipeline.render import jpeg_parts
from wherefrom.pipeline.render.choose import make_renderer
from wherefrom.pipeline.render.jpeg_parts import part_decoder
from wherefrom.pipeline.render.native_cutter import NativeCutter
from wherefrom.pipeline.render.renderer import Rendered, view_shapes
from wherefrom.pipeline.render.threads import PackedRecords, ThreadedRenderer
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.picture_headers import examine_picture
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Record


def library_missing() -> str | None:
    """Return why there is nothing here to decode parts with; a library whose pixels differ is there, and fails the tests."""
    try:
        return native_missing() or (open_jpeg(str(Image.core.__file__)), None)[1]
    except ValueError as error:
        return f"Pillow's libjpeg decodes no parts here: {error}"


pytestmark = pytest.mark.skipif(library_missing() is not None, reason=str(library_missing()))


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    if rng.random() < 0.2:
        return int(rng.integers(1, 40)), int(rng.integers(1, 700))
    return int(rng.integers(1, 200)), int(rng.integers(1, 200))


def random_part(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    top, left = int(rng.integers(height)), int(rng.integers(width))
    return top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))


def outside(shown: Bytes, whole: Bytes, decoded: Sequence[int]) -> Bytes:
    """Return where a decoded part (top, left, height, width) differs from the whole."""
    top, left, height, width = decoded
    return (shown != whole[top : top + height, left : left + width]).any(-1)


def assert_parts_of_every_kind_are_those_of_the_whole(pictures: int) -> None:
    rng, jpeg, differs = np.random.default_rng(pictures), part_decoder(), 0
    for number in range(pictures):
        size, sampling = random_size(rng), SAMPLINGS[number % len(SAMPLINGS)]
        restart = int(rng.choice([0, 1, 3])) if sampling in (*RESTARTS, "Gray") else 0
        file = jpeg_of(picture_of(rng, *size), sampling, int(rng.integers(20, 99)), restart)
        whole = simplejpeg.decode_jpeg(file, "RGB", strict=True)
        for _ in range(4):
            top, left, height, width = random_part(rng, *size)
            shown, decoded = decode_part(jpeg, file, size, (top, left, height, width))
            wrong = outside(shown.numpy(), whole, decoded)
            inside = wrong[top - decoded[0] :, left - decoded[1] :][:height, :width]
            assert inside.shape == (height, width) and not inside.any(), f"picture {number}, {sampling}, {size}, part at {top}, {left}"
            differs += wrong.any()
    assert differs  # at the edges of parts, which therefore hold more than is read


@pytest.mark.core
def test_parts_of_every_kind_are_those_of_the_whole() -> None:
    assert_parts_of_every_kind_are_those_of_the_whole(120)


@pytest.mark.slow
def test_parts_of_10_000_pictures_are_those_of_the_whole() -> None:
    assert_parts_of_every_kind_are_those_of_the_whole(10_000)


@pytest.mark.core
def test_what_is_decoded_is_little_more_than_what_is_needed() -> None:
    size = (400, 500)
    file = jpeg_of(picture_of(np.random.default_rng(0), *size), "420")
    _, (top, left, height, width) = decode_part(part_decoder(), file, size, (200, 250, 30, 40))
    assert 190 < top <= 200 and 230 < left <= 250 and height <= 40 and width <= 40 + 24


RECIPE = ViewRecipe(
    families=(
        ViewFamily(
            name="large", views=2, size_px=(40, 31), law=Independent(area_frac=(0.02, 0.3)), mirror="view", snap="none", min_side_px=1
        ),
        ViewFamily(
            name="small", views=2, size_px=(20, 28), law=Independent(area_frac=(0.005, 0.1)), mirror="view", turns=True, min_side_px=1
        ),
    ),
    pixels="float32",
)


def records_for(recipe: ViewRecipe, files: Sequence[Bytes], epoch: int = 0) -> Sequence[Record]:
    headers = [examine_picture(file.tobytes()) for file in files]
    size = np.array([(header.height, header.width) for header in headers], np.int32).reshape(-1, 2)
    stored, ids = np.array([header.orientation for header in headers], np.uint8), np.arange(len(files))
    return draw_records(recipe, seed=5, epoch=epoch, drawn_for=ids, source_size=size, stored_orientation=stored)


def render_both(files: Sequence[Bytes], epoch: int = 0, recipe: ViewRecipe = RECIPE) -> tuple[Rendered, Rendered, list[bool]]:
    """Render files whole and, where that serves, in part; return both, and which were not decoded whole in the end."""
    renderer, records = make_renderer(recipe, "native", threads=0), records_for(recipe, files, epoch)
    whole = renderer.render(files, records)
    whole = Rendered(pixels=tuple(pixels.clone() for pixels in whole.pixels), failed=whole.failed)
    cut, served = renderer.cutter.cut_jpegs, [False] * len(files)  # type: ignore[attr-defined]

    def watched(plan: object, encoded: object, sizes: object, asked: NDArray[np.bool_]) -> tuple[list[int], float, float]:
        left, *seconds = cut(plan, encoded, sizes, asked)
        served[:] = [position not in left for position in np.flatnonzero(asked)]
        return left, *seconds

    renderer.cutter.cut_jpegs = watched  # type: ignore[attr-defined]
    parts = renderer.render(files, records, np.ones(len(files), bool))  # type: ignore[call-arg]
    return whole, parts, served


def assert_equal(one: Rendered, other: Rendered, positions: Sequence[int]) -> None:
    assert one.failed == other.failed
    for ours, theirs in zip(one.pixels, other.pixels, strict=True):
        assert torch.equal(ours[list(positions)], theirs[list(positions)])


def assert_views_from_parts_are_those_from_the_whole_in_every_orientation(epochs: int) -> None:
    rng, served = np.random.default_rng(1), np.zeros(9, int)
    for epoch in range(epochs):
        files = []
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            size = (int(rng.integers(90, 200)), int(rng.integers(90, 200)))
            subsampling = int(rng.integers(3))
            files.append(np.frombuffer(by_pillow(picture_of(rng, *size), subsampling=subsampling, exif=exif.tobytes()), np.uint8))
        whole, parts, in_part = render_both(files, epoch)
        assert whole.failed == {}
        assert_equal(whole, parts, range(8))
        served[1:] += in_part
    assert (served[1:] > 0).all()


@pytest.mark.core
def test_views_from_parts_are_those_from_the_whole_in_every_orientation() -> None:
    assert_views_from_parts_are_those_from_the_whole_in_every_orientation(6)


@pytest.mark.slow
def test_views_from_parts_of_1600_pictures_are_those_from_the_whole() -> None:
    assert_views_from_parts_are_those_from_the_whole_in_every_orientation(200)


@pytest.mark.core
def test_the_pixel_proof_holds_of_pictures_decoded_in_part() -> None:
    served: list[float] = []

    class InParts(ThreadedRenderer):
        """Decodes in part whatever can be."""

        def render(
            self, encoded: Sequence[Bytes], records: Sequence[Record], decodable: object = None, packed: PackedRecords | None = None
        ) -> Rendered:
            return super().render(encoded, records, np.ones(len(encoded), bool), packed)

    class Cutter(NativeCutter):
        def cut_jpegs(self, plan: Any, encoded: Sequence[Bytes], *known: Any) -> tuple[list[int], float, float]:
            left, *seconds = super().cut_jpegs(plan, encoded, *known)
            served.append(1 - len(left) / len(encoded))
            return left, *seconds

    case = ProofCase(size_px=(72, 56), source_size=(333, 410), pixels="float32", format="JPEG", snap="none", laws=("paired",))
    report = prove(lambda recipe: InParts(Cutter(recipe), threads=0), cases=[case])
    assert report.passed
    assert np.mean(served) > 0.5


@pytest.mark.core
def test_only_jpegs_of_one_scan_and_of_colors_are_decoded_in_part() -> None:
    files = kinds(np.random.default_rng(2))
    whole, parts, served = render_both([np.frombuffer(file, np.uint8) for file in files.values()])
    assert_equal(whole, parts, range(len(files)))
    assert dict(zip(files, served, strict=True)) == {name: name in ("baseline", "gray") for name in files}


@pytest.mark.core
def test_views_of_all_of_a_picture_are_those_of_its_whole() -> None:
    recipe = ViewRecipe(families=(ViewFamily(name="whole", views=1, size_px=32, law=Center()),))
    rng = np.random.default_rng(3)
    files = [np.frombuffer(jpeg_of(picture_of(rng, 150, 170), sampling), np.uint8) for sampling in SAMPLINGS]
    whole, parts, served = render_both(files, recipe=recipe)
    assert all(served)
    assert_equal(whole, parts, range(len(files)))


@pytest.mark.core
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_a_batch_and_render_each_picture_once(threads: int) -> None:
    rng = np.random.default_rng(8)
    files = [np.frombuffer(jpeg_of(picture_of(rng, 90 + number, 120), "420"), np.uint8) for number in range(24)]
    files[5] = np.frombuffer(by_pillow(picture_of(rng, 95, 120), progressive=True), np.uint8)
    records, asked = records_for(RECIPE, files), np.arange(24) % 7 > 0
    alone = make_renderer(RECIPE, "native", threads=0)
    whole = alone.render(files, records)
    together = make_renderer(RECIPE, "native", threads=threads)
    shares: list[list[int]] = []
    cut = together.cutter.cut_jpegs  # type: ignore[attr-defined]

    def watched(*batch: Any) -> tuple[list[int], float, float]:
        left, *seconds = cut(*batch)
        shares.append(left)
        return left, *seconds

    together.cutter.cut_jpegs = watched  # type: ignore[attr-defined]
    try:
        parts = together.render(files, records, asked)  # type: ignore[call-arg]
    finally:
        together.close()
    assert shares == [[5]]  # one call a batch
    assert_equal(whole, parts, range(24))


@pytest.mark.core
@pytest.mark.parametrize(
    ("files", "sizes", "asked", "words"),
    [(2, 3, 3, "2 files for the records of 3"), (3, 2, 3, "sizes has 16 bytes, expected 24"), (3, 3, 4, "asked has 4 bytes, expected 3")],
)
def test_files_of_another_number_than_the_records_are_refused(files: int, sizes: int, asked: int, words: str) -> None:
    file = np.frombuffer(jpeg_of(picture_of(np.random.default_rng(9), 90, 120), "420"), np.uint8)
    cutter, records = NativeCutter(RECIPE), records_for(RECIPE, [file] * 3)
    plan = cutter.plan(records, [torch.empty(shape) for shape in view_shapes(RECIPE, 3)])
    with pytest.raises(ValueError, match=words):
        cutter.cut_jpegs(plan, [file] * files, np.full((sizes, 2), 90, np.int32), np.ones(asked, bool))


@pytest.mark.core
def test_a_file_of_another_size_or_cut_short_is_decoded_whole_and_judged_by_that() -> None:
    rng = np.random.default_rng(4)
    picture = picture_of(rng, 150, 170)
    valid = jpeg_of(picture, "420")
    files = [np.frombuffer(valid, np.uint8)] * 4
    renderer, records = make_renderer(RECIPE, "native", threads=0), records_for(RECIPE, files)
    wrong = [valid, jpeg_of(picture_of(rng, 170, 150), "420"), valid[: len(valid) // 8], b"\xff\xd8" + bytes(100)]
    given = [np.frombuffer(file, np.uint8) for file in wrong]
    rendered = renderer.render(given, records, np.ones(4, bool))  # type: ignore[call-arg]
    alone = renderer.render(given, records)
    assert list(rendered.failed) == [1, 2, 3] and rendered.failed == alone.failed


def mutated(file: bytes, rng: np.random.Generator) -> bytes:
    """Damage a file in one place or a few, most often behind its headers."""
    damaged = bytearray(file[: int(rng.integers(len(file) // 2, len(file)))] if rng.random() < 0.2 else file)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(2 if rng.random() < 0.3 else len(damaged) // 4, len(damaged)))
        damaged[at] = int(rng.integers(256))
    return bytes(damaged)


def decodes(file: bytes) -> bool:
    try:
        decode_picture(np.frombuffer(file, np.uint8))
    except DECODE_ERRORS:
        return False
    return True


def shard_of(folder: Path, files: Sequence[bytes]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for number, file in enumerate(files):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
    return folder


def assert_damaged_files_give_the_records_and_replacements_of_whole_decoding(count: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(count)
    valid = [jpeg_of(picture_of(rng, 90, 120), sampling) for sampling in SAMPLINGS] + [
        by_pillow(picture_of(rng, 90, 120), progressive=True)
    ]
    files = [mutated(valid[number % len(valid)], rng) if number % 3 else valid[number % len(valid)] for number in range(count)]
    plain, audited = shard_of(tmp_path / "plain", files), shard_of(tmp_path / "audited", files)
    indexes = ShardIndex.open(str(plain)), ShardIndex.open(str(audited), decode=True)
    assert not indexes[0].decodable.any() and 0 < indexes[1].decodable.sum() < indexes[0].valid.sum()
    batches = []
    for index in indexes:
        with make_loader(index, RECIPE, seed=1, global_batch=50, renderer="native", threads=0, max_bad=count) as loader:
            batches.append([(batch.sample.clone(), [views.pixels.clone() for views in batch.views], batch.views) for batch in loader])
    # what turns out undecodable on the way is replaced from then on; until then, and in all records, both are the same
    assert len(batches[0]) == len(batches[1]) == count // 50
    for (sample, pixels, views), (other_sample, other_pixels, other_views) in zip(*batches, strict=True):
        assert torch.equal(sample, other_sample)
        assert all(torch.equal(a, b) for a, b in zip(pixels, other_pixels, strict=True))
        assert all(torch.equal(a.geometry.boxes, b.geometry.boxes) for a, b in zip(views, other_views, strict=True))
    assert [decodes(file) for file in files] == indexes[1].decodable.tolist()


@pytest.mark.core
def test_damaged_files_give_the_records_and_replacements_of_whole_decoding(tmp_path: Path) -> None:
    assert_damaged_files_give_the_records_and_replacements_of_whole_decoding(150, tmp_path)


@pytest.mark.slow
def test_10_000_damaged_files_give_the_records_and_replacements_of_whole_decoding(tmp_path: Path) -> None:
    assert_damaged_files_give_the_records_and_replacements_of_whole_decoding(10_000, tmp_path)


@pytest.mark.core
def test_the_share_that_views_show_is_that_of_the_rectangle_around_them() -> None:
    size = np.tile(np.array([[300, 400]], np.int32), (200, 1))

    def shown(views: int, *area_frac: float) -> float:
        law = Independent(area_frac=(area_frac[0], area_frac[-1]), aspect=(1, 1))
        return shown_frac(ViewRecipe(families=(ViewFamily(name="a", views=views, size_px=32, law=law),)), size)

    assert abs(shown(1, 0.25) - 0.25) < 0.005
    assert abs(shown(1, 0.1, 0.3) - 0.2) < 0.01
    assert 0.25 < shown(2, 0.25) < shown(8, 0.25) <= 1


@pytest.mark.core
def test_only_pictures_that_the_index_decoded_are_decoded_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, asked = np.random.default_rng(6), []
    files = [jpeg_of(picture_of(rng, 90, 120), "420") for _ in range(8)]
    folder = shard_of(tmp_path / "shards", files)
    for decode in (False, True):
        with make_loader(ShardIndex.open(str(folder), decode=decode), RECIPE, global_batch=8, renderer="native", threads=0) as loader:
            cutter = loader.renderer.cutter  # type: ignore[attr-defined]
            cut = cutter.cut_jpegs

            def watched(*batch: Any, decode: bool = decode, cut: Any = cut) -> Any:
                asked.append((decode, int(batch[-1].sum())))
                return cut(*batch)

            monkeypatch.setattr(cutter, "cut_jpegs", watched)
            next(iter(loader))
    assert asked == [(True, 8)]


@pytest.mark.core
def test_a_library_that_does_not_serve_is_named_once_and_pictures_are_decoded_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="no shared object: "):
        open_jpeg("there/is/no/such.so")
    with pytest.raises(ValueError, match="it has no function jpeg_"):
        open_jpeg(str(np._core._multiarray_umath.__file__))
    file = np.frombuffer(jpeg_of(picture_of(np.random.default_rng(7), 150, 170), "420"), np.uint8)
    expected = render_both([file])[0]
    monkeypatch.setattr(jpeg_parts, "open_jpeg", lambda _: open_jpeg("there/is/no/such.so"))
    jpeg_parts._open.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                whole, parts, served = render_both([file])
        assert served == [False] and len([record for record in caplog.records if "decoded whole" in record.message]) == 1
        assert_equal(expected, parts, [0])
        assert_equal(expected, whole, [0])
    finally:
        jpeg_parts._open.cache_clear()


@pytest.mark.core
def test_a_library_whose_pixels_differ_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = part_decoder()
    jpeg_parts._prove(jpeg)

    def one_level_off(*arguments: object) -> tuple[torch.Tensor, tuple[int, ...]]:
        pixels, part = decode_part(*arguments)  # type: ignore[arg-type]
        return pixels ^ 1, part

    monkeypatch.setattr(jpeg_parts, "decode_part", one_level_off)
    with pytest.raises(ValueError, match="its parts of 444 pictures differ"):
        jpeg_parts._prove(jpeg)
