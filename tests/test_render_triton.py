"""The `triton` renderer against the float64 reference, DALI's float pixels, the pixel proof, and hostile files and records.

Without a GPU Triton's interpreter runs the kernel and the CPU decodes: pictures and views are tiny, for it takes milliseconds a view.
"""

import io
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("triton")

from wherefrom.pipeline.proof import prove as proof
from wherefrom.pipeline.proof.level_errors import away_from_borders, level_errors, levels, reference_levels
from wherefrom.pipeline.proof.prove import MISTAKES, ProofCase, prove
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render import dali_decode, triton_renderer
from wherefrom.pipeline.render.dali_decode import DaliDecoder, StockDecoder, installed
from wherefrom.pipeline.render.dali_renderer import DaliRenderer
from wherefrom.pipeline.render.triton_renderer import TritonRenderer
from wherefrom.pipeline.view_recipe import ColorLaw, Independent, PixelType, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Photometric, Record, ViewGeometry

Mistake = Callable[[ViewGeometry, Photometric], tuple[ViewGeometry, Photometric]]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_dali = pytest.mark.skipif(not installed(), reason="NVIDIA DALI is not installed")
Bytes = NDArray[np.uint8]
ALL_COLOR = ColorLaw(blur_prob=0.5, solarize_prob=0.3)
SIZES = ((40, 53), (31, 24), (24, 60))
ORIENTATIONS = (1, 6, 3)  # of the files of SIZES, which are upright
FLOAT_BAR, BYTE_BAR = 2e-3, 0.51  # levels of 255, worst
DALI_MEAN_BAR = 0.02


def recipe_of(color: ColorLaw | None = ALL_COLOR, pixels: PixelType = "float32") -> ViewRecipe:
    small = Independent(area_frac=(0.05, 0.5))
    return ViewRecipe(
        families=(
            ViewFamily(name="large", views=2, size_px=(20, 20), mirror="view", color=color, snap="none"),
            ViewFamily(name="small", views=2, size_px=(9, 12), law=small, mirror="view", turns=True, color=color, min_side_px=4),
        ),
        pixels=pixels,
    )


def records_for(recipe: ViewRecipe, sizes: Sequence[tuple[int, int]] = SIZES, orientations: Sequence[int] = ORIENTATIONS) -> list[Record]:
    ids = np.arange(len(sizes))
    return draw_records(
        recipe,
        seed=5,
        epoch=0,
        drawn_for=ids,
        source_size=np.array(sizes, np.int32).reshape(-1, 2),
        stored_orientation=np.array(orientations, np.uint8),
    )


def chosen(records: Sequence[Record], samples: list[int]) -> list[Record]:
    return [record[samples] for record in records]


def stored_pixels(file: Bytes) -> Bytes:
    return np.asarray(Image.open(io.BytesIO(file.tobytes())).convert("RGB"))


def encoded(picture: Bytes, orientation: int, format: str = "PNG") -> Bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format, exif=exif.tobytes())
    return np.frombuffer(file.getvalue(), np.uint8)


@pytest.fixture(scope="module")
def files() -> list[Bytes]:
    """Three pictures of noise, of SIZES once upright: a PNG, a PNG and a JPEG."""
    random = np.random.Generator(np.random.Philox(3))
    stored = [size[::-1] if orientation >= 5 else size for size, orientation in zip(SIZES, ORIENTATIONS, strict=True)]
    pictures = [random.integers(0, 256, (*size, 3), np.uint8) for size in stored]
    return [encoded(*one) for one in zip(pictures, ORIENTATIONS, ("PNG", "PNG", "JPEG"), strict=True)]


def worst_errors(files: Sequence[Bytes], records: Sequence[Record], recipe: ViewRecipe) -> list[float]:
    rendered = TritonRenderer(recipe, device=DEVICE).render(files, records)
    assert rendered.failed == {}
    expected = [reference_levels([stored_pixels(file) for file in files], record) for record in records]
    return [float((levels(a, recipe) - b).abs().max()) for a, b in zip(rendered.pixels, expected, strict=True)]


@pytest.mark.parametrize(("color", "pixels"), [(None, "float32"), (ALL_COLOR, "float32"), (ALL_COLOR, "uint8")])
def test_pixels_equal_the_reference(files: list[Bytes], color: ColorLaw | None, pixels: PixelType) -> None:
    recipe = recipe_of(color, pixels)
    records = records_for(recipe)
    assert max(worst_errors(files, records, recipe)) <= (BYTE_BAR if pixels == "uint8" else FLOAT_BAR)


@pytest.mark.core
def test_half_precision_rounds_once(files: list[Bytes]) -> None:
    wide, half = recipe_of(), recipe_of(pixels="float16")
    records = records_for(wide)
    pair = (TritonRenderer(recipe, device=DEVICE).render(files, records).pixels for recipe in (wide, half))
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a.half(), b)


@pytest.mark.core
@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda g, p: (replace(g, boxes=g.boxes * 0.999), p), id="a thousandth aside"),
        pytest.param(lambda g, p: (replace(g, flipped=~g.flipped), p), id="mirrored"),
        pytest.param(lambda g, p: (replace(g, quarter_turns=g.quarter_turns + 1), p), id="turned"),
        pytest.param(lambda g, p: (g, replace(p, hue_rad=p.hue_rad + 0.01)), id="another hue"),
        pytest.param(lambda g, p: (g, replace(p, blur_sigma_px=p.blur_sigma_px * 1.1)), id="another blur"),
        pytest.param(lambda g, p: (g, replace(p, solarized=~p.solarized)), id="solarized the others"),
    ],
)
def test_the_bars_see_small_mistakes(files: list[Bytes], mistake: Mistake) -> None:
    recipe = recipe_of()
    record = records_for(recipe)[0]
    wrong = Record.of(*mistake(record.geometry, record.photometric))
    right, mistaken = (reference_levels([stored_pixels(file) for file in files], one) for one in (record, wrong))
    assert (right - mistaken).abs().max() > BYTE_BAR


@pytest.mark.core
@needs_dali
def test_pixels_equal_those_of_dali(files: list[Bytes]) -> None:
    recipe = recipe_of()
    records = records_for(recipe)
    both = (TritonRenderer(recipe, device=DEVICE), DaliRenderer(recipe, threads=2))
    for ours, dalis, record in zip(*(renderer.render(files, records).pixels for renderer in both), records, strict=True):
        error = level_errors(levels(ours, recipe), levels(dalis, recipe), away_from_borders(record))
        assert max(error.inside_mean, error.border_mean) <= DALI_MEAN_BAR


def assert_proven(laws: Sequence[str], cases: Sequence[ProofCase], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "LAWS", {law: proof.LAWS[law] for law in laws})
    report = prove(lambda recipe: TritonRenderer(recipe, device=DEVICE), cases=cases)
    assert report.renderer == "triton"
    assert [row for row in report.rows if not row.passed] == []
    assert {control.mistake for control in report.controls if control.caught} == set(MISTAKES)


def test_pixels_prove_the_record_in_a_cut_through_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ProofCase(size_px=(20, 24), source_size=(61, 73), pixels="float32", format="PNG", snap="none")
    assert_proven(["grid"], [case], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("laws", "case"),
    [
        (list(proof.LAWS), ProofCase(size_px=(20, 24), source_size=(61, 73), pixels="float32", format="PNG", snap="pixel")),
        (["independent"], ProofCase(size_px=(30, 22), source_size=(67, 59), pixels="uint8", format="JPEG", snap="none")),
    ],
)
def test_pixels_prove_the_record_for_every_law_and_output(laws: list[str], case: ProofCase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_proven(laws, [case], monkeypatch)


def test_batch_size_and_order_change_no_bit(files: list[Bytes]) -> None:
    recipe = recipe_of()
    records = records_for(recipe)
    renderer = TritonRenderer(recipe, device=DEVICE)
    together = renderer.render(files, records).pixels
    for samples in ([0], [2, 1], [1, 0, 2, 1]):
        alone = renderer.render([files[i] for i in samples], chosen(records, samples)).pixels
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part, whole[samples])


def test_threads_that_share_a_renderer_get_their_own_pixels(files: list[Bytes]) -> None:
    recipe = recipe_of(None)
    records = records_for(recipe)
    renderer = TritonRenderer(recipe, device=DEVICE)
    expected = renderer.render(files, records).pixels
    got: dict[int, tuple[torch.Tensor, ...]] = {}

    def work(sample: int) -> None:
        got[sample] = renderer.render([files[sample]], chosen(records, [sample])).pixels

    threads = [threading.Thread(target=work, args=(sample,)) for sample in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sample, pixels in got.items():
        assert all(torch.equal(part, whole[[sample]]) for part, whole in zip(pixels, expected, strict=True))
    assert sorted(got) == [0, 1, 2]


def test_pictures_that_will_not_decode_are_named_and_leave_the_others_alone(files: list[Bytes]) -> None:
    recipe = recipe_of()
    records = records_for(recipe)
    garbage = np.frombuffer(b"\xff\xd8 no picture", np.uint8)
    another_size = encoded(np.zeros((7, 9, 3), np.uint8), 1)
    renderer = TritonRenderer(recipe, device=DEVICE)
    expected = renderer.render(files, records).pixels
    rendered = renderer.render([garbage, files[1], another_size], records)
    assert sorted(rendered.failed) == [0, 2]
    assert rendered.failed[2] == "decodes to (height, width) (7, 9), its record says (24, 60); build the index again"
    for pixels, sound in zip(rendered.pixels, expected, strict=True):
        assert torch.equal(pixels[1], sound[1])


def test_a_batch_of_none_has_none_of_every_view() -> None:
    recipe = recipe_of(pixels="float16")
    rendered = TritonRenderer(recipe, device=DEVICE).render([], records_for(recipe, (), ()))
    assert [tuple(pixels.shape) for pixels in rendered.pixels] == [(0, 2, 3, 20, 20), (0, 2, 3, 9, 12)]
    assert {pixels.dtype for pixels in rendered.pixels} == {torch.float16}


def with_box(geometry: ViewGeometry, box: Sequence[float]) -> ViewGeometry:
    boxes = geometry.boxes.clone()
    boxes[1, 0] = torch.tensor(box)
    return replace(geometry, boxes=boxes)


@pytest.mark.core
@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (lambda g, p: (with_box(g, [1, 2, 25, 9]), p), r"box \[1.0, 2.0, 25.0, 9.0\] of family 'large', sample 1, view 0: leaves"),
        (lambda g, p: (with_box(g, [float("nan")] * 4), p), r"box \[nan, nan, nan, nan\] of family 'large', sample 1, view 0: leaves"),
        (lambda g, p: (with_box(g, [9, 2, 3, 9]), p), "leaves its picture of .* cut it back"),
        (
            lambda g, p: (replace(g, stored_orientation=g.stored_orientation * 0), p),
            "stored_orientation of sample 0 is 0: EXIF knows 1 to 8",
        ),
        (
            lambda g, p: (g, replace(p, blur_sigma_px=p.blur_sigma_px - 5)),
            "blur_sigma_px of family 'large', sample 0, view 0 is -.*needs 0 to",
        ),
        (lambda g, p: (g, replace(p, blur_sigma_px=p.blur_sigma_px * torch.inf)), "blur_sigma_px of family 'large', .* needs 0 to 1000"),
    ],
)
def test_a_hostile_record_is_refused(files: list[Bytes], hostile: Mistake, message: str) -> None:
    recipe = recipe_of()
    records = records_for(recipe)
    with pytest.raises(ValueError, match=message):
        TritonRenderer(recipe, device=DEVICE).render(files, [Record.of(*hostile(records[0].geometry, records[0].photometric)), records[1]])


def addressed(address: int, size: NDArray[np.int32]) -> Bytes:
    """Copy a picture out of memory that only its address tells of."""
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * (3 * int(size.prod()))).from_address(address)).reshape(*size, 3).copy()


@pytest.mark.core
@needs_dali
def test_dali_decodes_what_the_stock_decoder_does_and_leaves_it_as_stored(files: list[Bytes]) -> None:
    dali, stock = DaliDecoder(device=torch.device("cpu"), threads=2), StockDecoder()
    for batch in (files[:1], files, files[1:]):  # the second needs a larger pipeline
        one, other = dali.decode(batch), stock.decode(batch)
        assert one.failed == other.failed == {}
        np.testing.assert_array_equal(one.sizes, other.sizes)
        for place in range(len(batch)):
            picture = addressed(one.addresses[place], one.sizes[place])
            np.testing.assert_array_equal(picture, addressed(other.addresses[place], other.sizes[place]))
            np.testing.assert_array_equal(picture, stored_pixels(batch[place]))
    dali.close()
    dali.close()


@pytest.mark.core
@needs_dali
def test_dali_and_the_stock_decoder_refuse_the_same_files_and_go_on(files: list[Bytes]) -> None:
    dali = DaliDecoder(device=torch.device("cpu"), threads=2)
    mixed = [files[0], np.frombuffer(b"no picture at all", np.uint8), files[1]]
    decoded = dali.decode(mixed)
    assert sorted(decoded.failed) == sorted(StockDecoder().decode(mixed).failed) == [1]
    assert decoded.sizes[1].tolist() == [1, 1]
    np.testing.assert_array_equal(addressed(decoded.addresses[2], decoded.sizes[2]), stored_pixels(files[1]))
    assert dali.decode(files).failed == {}


@pytest.mark.core
def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_renderer, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"""device='cpu': renderer "triton" runs on "cuda"; use renderer="torch\""""):
        TritonRenderer(recipe_of(), device="cpu")


@pytest.mark.core
def test_without_triton_there_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_renderer, "triton_missing", lambda: "Triton is not installed")
    with pytest.raises(ValueError, match=r"""renderer "triton" cannot run: Triton is not installed; or use renderer="dali\""""):
        TritonRenderer(recipe_of(), device=DEVICE)


@pytest.mark.core
def test_without_dali_there_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_decode, "installed", lambda: False)
    with pytest.raises(ValueError, match="needs NVIDIA DALI to decode, not installed here; pip install nvidia-dali-cuda130"):
        DaliDecoder(device=torch.device("cpu"))


def test_importing_the_module_leaves_dali_and_triton_out() -> None:
    code = "import sys, wherefrom.pipeline.render.triton_renderer; sys.exit('nvidia.dali' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd="/").returncode == 0
