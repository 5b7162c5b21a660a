"""The compiled view kernel against the float64 reference, over records, sizes, dtypes, memory formats and instruction sets.

Where the kernel is not built, its tests are skipped aloud and those of the reference path remain.
"""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wherefrom.kernels.render_views import ViewPlan, ViewRequest, instruction_sets, native_missing, render_views
from wherefrom.kernels.render_views_reference import render_views_reference, resize_weights

MISSING = native_missing()
needs_native = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
SETS = instruction_sets() if MISSING is None else ["none"]
WORST_LEVELS = 2e-3  # float32, before normalization
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One picture and the records of its views, (1, V, ...)."""

    picture: Tensor
    boxes: Tensor
    flipped: Tensor
    quarter_turns: Tensor
    size_px: tuple[int, int]
    orientation: int = 1
    matrix: Tensor | None = None
    blur_sigma_px: Tensor | None = None
    solarized: Tensor | None = None
    filter: Any = "plain"

    def rendered(self, **options: Any) -> Tensor:
        """Render by render_views: (V, 3, h, w)."""
        record = {name: getattr(self, name) for name in RECORD}
        orientation = torch.tensor([self.orientation], dtype=torch.uint8)
        return render_views([self.picture], **record, orientation=orientation, **options)[0]

    def on(self, instruction_set: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Render by the compiled kernel on one instruction set, into memory that is poisoned: (V, 3, h, w)."""
        request = self.request(dtype)
        orientation = torch.tensor([self.orientation], dtype=torch.uint8)
        ViewPlan([request], orientation=orientation, filter=self.filter, instruction_set=instruction_set).render_all([self.picture])
        return request.out[0]

    def request(self, dtype: torch.dtype = torch.float32) -> ViewRequest:
        out = torch.full((*self.boxes.shape[:2], 3, *self.size_px), 77 if dtype == torch.uint8 else float("nan"), dtype=dtype)
        names = ("boxes", "flipped", "quarter_turns", "matrix", "blur_sigma_px", "solarized")
        return ViewRequest(**{name: getattr(self, name) for name in names}, out=out)

    def truth(self) -> Tensor:
        """Render by the definition, in levels: (V, 3, h, w) float64."""
        record = {name: getattr(self, name) for name in ("boxes", "flipped", "quarter_turns", "matrix", "blur_sigma_px", "solarized")}
        views = {name: None if value is None else value[0] for name, value in record.items()}
        return render_views_reference(self.picture, size_px=self.size_px, orientation=self.orientation, filter=self.filter, **views)


RECORD = ("boxes", "flipped", "quarter_turns", "size_px", "matrix", "blur_sigma_px", "solarized", "filter")


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).integers(0, 256, (height, width, 3), np.uint8))


def plain_case(picture: Tensor, box: tuple[float, ...], size_px: tuple[int, int], **others: Any) -> Case:
    case = Case(
        picture=picture,
        boxes=torch.tensor([[box]], dtype=torch.float32),
        flipped=torch.tensor([[False]]),
        quarter_turns=torch.tensor([[0]]),
        size_px=size_px,
    )
    return replace(case, **others)


def random_case(seed: int, height: int, width: int, size_px: tuple[int, int], views: int = 2) -> Case:
    """Draw records that a recipe never would: boxes of 0.7 pixel, far larger than the picture, across its edge, outside of it."""
    rng = np.random.default_rng(seed)
    orientation = int(rng.integers(1, 9))
    upright = np.array([height, width] if orientation >= 5 else [width, height])
    center = rng.uniform(-0.3, 1.3, (views, 2)) * upright
    sides = np.exp(rng.uniform(-0.7, 0.7, (views, 2))) * np.where(rng.random((views, 1)) < 0.2, 0.7, upright * rng.choice([0.3, 1, 3]))
    boxes = np.concatenate([center - sides / 2, center + sides / 2], -1)
    if rng.random() < 0.3:
        boxes = np.round(boxes)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    matrix = np.eye(3, 4) + rng.normal(0, 0.2, (views, 3, 4)) * [1, 1, 1, 50]
    matrix[rng.random(views) < 0.3] = np.eye(3, 4)
    sigma = np.where(rng.random(views) < 0.5, rng.choice([0.1, 0.8, 2.0, 2.0001, 9.0], views), 0)
    return Case(
        picture=noise(height, width, seed),
        boxes=torch.from_numpy(boxes[None]).float(),
        flipped=torch.from_numpy(rng.random((1, views)) < 0.5),
        quarter_turns=torch.from_numpy(rng.integers(0, 4, (1, views))),
        size_px=size_px,
        orientation=orientation,
        matrix=torch.from_numpy(matrix[None]).float() if rng.random() < 0.6 else None,
        blur_sigma_px=torch.from_numpy(sigma[None]).float() if rng.random() < 0.5 else None,
        solarized=torch.from_numpy(rng.random((1, views)) < 0.5) if rng.random() < 0.5 else None,
        filter="centered" if rng.random() < 0.4 else "plain",
    )


def assert_close_in_levels(got: Tensor, truth: Tensor, worst: float = WORST_LEVELS) -> None:
    """Raise unless no value is further than `worst` from the truth; NaN is far."""
    assert got.shape == truth.shape
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=worst)


sides = st.one_of(st.integers(1, 9), st.integers(10, 90))


@pytest.mark.core
@needs_native
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), height=sides, width=sides, size=st.tuples(sides, sides))
def test_native_equals_the_reference_on_any_record(seed: int, height: int, width: int, size: tuple[int, int]) -> None:
    case = random_case(seed, height, width, size)
    truth = case.truth()
    for name in SETS:
        assert_close_in_levels(case.on(name), truth)


@pytest.mark.core
@needs_native
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), height=sides, width=sides, size=st.tuples(sides, sides), name=st.sampled_from(SETS))
def test_every_dtype_is_the_reference_but_for_its_rounding(seed: int, height: int, width: int, size: tuple[int, int], name: str) -> None:
    case = random_case(seed, height, width, size)
    truth = case.truth()
    assert_close_in_levels(case.on(name, torch.uint8), truth.clamp(0, 255), 0.51)
    for dtype in (torch.float16, torch.bfloat16):
        got = case.on(name, dtype)
        half_an_ulp = truth.abs() * torch.finfo(dtype).eps / 2
        assert ((got.double() - truth).abs() <= half_an_ulp + WORST_LEVELS).all()
        assert torch.equal(got, case.on(name).to(dtype)), "not the nearest, ties to even"


@pytest.mark.core
@needs_native
@pytest.mark.parametrize("name", SETS)
def test_half_precision_rounds_as_torch_does_also_where_it_has_few_bits(name: str) -> None:
    values = torch.cat([torch.logspace(-9, 5.5, 997), torch.tensor([0.0, 2**-14, 2**-24, 2**-25, 65504, 65519.9, 65520])])
    values = torch.cat([values, -values])
    for dtype in (torch.float16, torch.bfloat16):
        for value in values.split(3):
            if len(value) == 3:  # one value a channel, by normalizing a black picture
                request = plain_case(torch.zeros(8, 8, 3, dtype=torch.uint8), (0, 0, 8, 8), (5, 7)).request(dtype)
                ViewPlan([request], mean=-value, std=torch.ones(3), instruction_set=name).render_all(
                    [torch.zeros(8, 8, 3, dtype=torch.uint8)]
                )
                assert torch.equal(request.out[0, 0], value.to(dtype)[:, None, None].expand(3, 5, 7))


@needs_native
@pytest.mark.parametrize("size_px", [(1, 1), (1, 518), (518, 3), (518, 518), (224, 224), (97, 63)])
@pytest.mark.parametrize("hw", [(1, 1), (1, 300), (3000, 2), (17, 33), (700, 500)])
def test_sizes_at_both_ends(hw: tuple[int, int], size_px: tuple[int, int]) -> None:
    for seed in range(2):
        case = random_case(seed, *hw, size_px, views=1)
        assert_close_in_levels(case.rendered(backend="native"), case.truth())


@needs_native
@needs_native
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("hw", "box"), [((2000, 10000), (0, 0, 10000, 2000)), ((29, 2244), (-273088, 10, 2.0**20, 20))])
def test_white_stays_white_however_many_pixels_a_sample_reads(name: str, hw: tuple[int, int], box: tuple[float, ...]) -> None:
    """Ten thousand roundings all point one way here; summed in one go they come to a hundredth of a level."""
    out = torch.empty(1, 1, 3, 2, 3)
    no = torch.zeros(1, 1, dtype=torch.bool)
    request = ViewRequest(boxes=torch.tensor(box, dtype=torch.float32).view(1, 1, 4), flipped=no, quarter_turns=no.long(), out=out)
    ViewPlan([request], instruction_set=name).render_all([torch.full((*hw, 3), 255, dtype=torch.uint8)])
    assert (out - 255).abs().max() <= WORST_LEVELS


@pytest.mark.slow
@pytest.mark.parametrize("hw", [(3000, 10000), (10000, 3000), (10000, 10)])
def test_the_largest_pictures(hw: tuple[int, int]) -> None:
    height, width = hw
    for box in ((0, 0, width, height), (width * 0.3, height * 0.4, width * 0.9, height * 0.7)):
        case = plain_case(noise(height, width), box, (518, 518))
        truth = case.truth()
        for name in SETS:
            assert_close_in_levels(case.on(name), truth)


@pytest.mark.core
@needs_native
def test_the_tolerance_tells_near_mistakes_from_the_kernel() -> None:
    case = plain_case(noise(60, 50), (3.2, 5.1, 44.7, 51.6), (20, 17))
    truth = case.truth()
    got = case.rendered(backend="native")
    assert_close_in_levels(got, truth)
    mistakes = {
        "shifted by a twentieth of a pixel": replace(case, boxes=case.boxes + 0.05).truth(),
        "shifted by half a pixel": replace(case, boxes=case.boxes + 0.5).truth(),
        "mirrored": replace(case, flipped=~case.flipped).truth(),
        "no widening of the filter": torch.nn.functional.grid_sample(
            case.picture.permute(2, 0, 1)[None].double(),
            torch.nn.functional.affine_grid(
                torch.tensor([[[41.5 / 50, 0, (3.2 + 44.7) / 50 - 1], [0, 46.5 / 60, (5.1 + 51.6) / 60 - 1]]]).double(),
                [1, 3, 20, 17],
                False,
            ),
            align_corners=False,
        ),
        "the other filter": replace(case, filter="centered").truth(),
        "upside down": truth.flip(-2),
    }
    for mistake in mistakes.values():
        with pytest.raises(AssertionError):
            assert_close_in_levels(got, mistake)
    with pytest.raises(AssertionError):
        assert_close_in_levels(case.rendered(backend="native", dtype=torch.uint8), truth + 0.02, 0.51)


@pytest.mark.core
@needs_native
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_eight_orientations_with_all_mirrors_and_turns(orientation: int) -> None:
    for flipped in (False, True):
        for turns in range(4):
            for blur in (0.0, 1.0):
                case = plain_case(
                    noise(23, 31),
                    (2.5, 1.25, 20.0, 19.5),
                    (18, 13),
                    flipped=torch.tensor([[flipped]]),
                    quarter_turns=torch.tensor([[turns]]),
                    orientation=orientation,
                    blur_sigma_px=torch.tensor([[blur]]),
                )
                assert_close_in_levels(case.rendered(backend="native"), case.truth())


@pytest.mark.core
@needs_native
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), height=sides, width=sides, size=st.tuples(sides, sides), dtype=st.sampled_from(DTYPES))
def test_channels_last_holds_the_same_values(seed: int, height: int, width: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    case = random_case(seed, height, width, size)
    planar, interleaved = (case.rendered(backend="native", dtype=dtype, channels_last=last) for last in (False, True))
    assert torch.equal(planar, interleaved)
    assert interleaved[None].permute(0, 1, 3, 4, 2).is_contiguous()


@needs_native
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), height=sides, width=sides, size=st.tuples(sides, sides))
def test_instruction_sets_agree_within_a_thousandth_of_a_level(seed: int, height: int, width: int, size: tuple[int, int]) -> None:
    case = random_case(seed, height, width, size)
    first, *others = (case.on(name) for name in SETS)
    for other in others:
        assert_close_in_levels(other, first.double(), 1e-3)


def a_batch(dtype: torch.dtype, views: int = 3, size_px: tuple[int, int] = (40, 33)) -> tuple[list[Tensor], dict[str, Any]]:
    """Draw seven pictures and their records; large enough with many views for results to go past the cache."""
    cases = [random_case(seed, 20 + 9 * seed, 90 - 11 * seed, size_px, views) for seed in range(7)]
    rng = np.random.default_rng(1)
    record = {name: torch.cat([getattr(case, name) for case in cases]) for name in ("boxes", "flipped", "quarter_turns")}
    shape = (len(cases), views)
    record["matrix"] = torch.eye(3, 4).expand(*shape, 3, 4) + torch.from_numpy(rng.normal(0, 0.1, (*shape, 3, 4))).float()
    record["blur_sigma_px"] = torch.from_numpy(np.where(rng.random(shape) < 0.5, 1.3, 0)).float()
    record["solarized"] = torch.from_numpy(rng.random(shape) < 0.3)
    record["orientation"] = torch.tensor([case.orientation for case in cases])
    return [case.picture for case in cases], record | {"size_px": size_px, "dtype": dtype, "backend": "native"}


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("views", "size_px"), [(3, (40, 33)), (12, (177, 208))])
def test_threads_and_runs_change_no_bit(dtype: torch.dtype, channels_last: bool, views: int, size_px: tuple[int, int]) -> None:
    pictures, batch = a_batch(dtype, views, size_px)
    normalized = {} if dtype == torch.uint8 else {"mean": MEAN, "std": STD}
    first = render_views(pictures, **batch, **normalized, channels_last=channels_last)
    for threads in (1, 2, 3, 50):
        again = render_views(pictures, **batch, **normalized, channels_last=channels_last, threads=threads)
        assert torch.equal(first, again)
    assert torch.isfinite(first).all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_too_large_for_the_cache_holds_what_a_small_one_does(dtype: torch.dtype, channels_last: bool) -> None:
    pictures, batch = a_batch(dtype, 40, (177, 208))
    assert len(pictures) * 40 * 3 * 177 * 208 > 8 << 20  # bytes, and more: past what the kernel keeps in the cache
    for name in SETS:
        records = {key: batch[key] for key in ("boxes", "flipped", "quarter_turns", "matrix", "blur_sigma_px", "solarized")}
        whole = torch.empty(7, 40, 177, 208, 3, dtype=dtype) if channels_last else torch.empty(7, 40, 3, 177, 208, dtype=dtype)
        whole = whole.permute(0, 1, 4, 2, 3) if channels_last else whole
        ViewPlan([ViewRequest(**records, out=whole)], orientation=batch["orientation"], instruction_set=name).render_all(pictures)
        for b in (0, 3):
            part = torch.empty(1, 9, 3, 177, 208, dtype=dtype)
            of_b = {key: value[b : b + 1, 5:14] for key, value in records.items()}
            ViewPlan([ViewRequest(**of_b, out=part)], orientation=batch["orientation"][b : b + 1], instruction_set=name).render_all(
                [pictures[b]]
            )
            assert torch.equal(part[0], whole[b, 5:14])


@needs_native
def test_a_plan_renders_picture_by_picture_from_many_threads_what_one_call_renders() -> None:
    pictures, batch = a_batch(torch.float32)
    small = batch | {"size_px": (16, 16)}
    whole = [render_views(pictures, **each, mean=MEAN, std=STD) for each in (batch, small)]
    names = ("boxes", "flipped", "quarter_turns", "matrix", "blur_sigma_px", "solarized")
    requests = [ViewRequest(**{name: batch[name] for name in names}, out=torch.full_like(out, float("nan"))) for out in whole]
    plan = ViewPlan(requests, orientation=batch["orientation"], mean=MEAN, std=STD)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(plan.render_picture, range(len(pictures)), [picture.numpy() for picture in pictures]))
    for request, expected in zip(requests, whole, strict=True):
        assert torch.equal(request.out, expected)


@needs_native
def test_a_plan_keeps_the_records_that_it_checked() -> None:
    case = plain_case(noise(20, 20), (2, 3, 15, 17), (8, 8))
    request = case.request()
    plan = ViewPlan([request])
    request.boxes.fill_(float("nan"))
    plan.render_picture(0, case.picture.numpy())
    assert_close_in_levels(request.out[0], plain_case(case.picture, (2, 3, 15, 17), (8, 8)).truth())


@needs_native
@pytest.mark.parametrize("name", SETS)
def test_normalized_views_are_normalized_levels(name: str) -> None:
    case = random_case(3, 40, 50, (30, 31))
    request = case.request()
    ViewPlan(
        [request], orientation=torch.tensor([case.orientation]), mean=MEAN, std=STD, filter=case.filter, instruction_set=name
    ).render_all([case.picture])
    back = (request.out[0].double() * STD.double()[:, None, None] + MEAN.double()[:, None, None]) * 255
    assert_close_in_levels(back, case.truth())


def ramp_error_px(native: bool, filter: str, scale: float) -> float:
    """Return how far the pixels of a ramp, 1 level a source pixel, lie from the place that their centers name."""
    ramp = torch.arange(250, dtype=torch.uint8)[None, :, None].expand(40, 250, 3).contiguous()
    samples = int(180 / scale)
    case = plain_case(ramp, (30.3, 5, 30.3 + samples * scale, 30), (7, samples), filter=filter)
    shown = case.rendered(backend="native" if native else "reference")[0, 0]
    named = 30.3 + (torch.arange(samples, dtype=torch.float64) + 0.5) * scale - 0.5
    return float((shown.double() - named).abs().max())


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("scale", [0.6, 1.13, 1.5, 2.31, 3.7])
def test_centered_weights_place_coordinates_to_a_thousandth_of_a_pixel(native: bool, scale: float) -> None:
    assert ramp_error_px(native, "centered", scale) < 1e-3
    if scale > 1:
        assert 1e-2 < ramp_error_px(native, "plain", scale) < 0.09  # so the test would see it


@given(pixels=st.integers(1, 60), start=st.floats(-5, 40), side=st.floats(0.1, 200), samples=st.integers(1, 70))
def test_centered_weights_sum_to_one_and_stay_positive(pixels: int, start: float, side: float, samples: int) -> None:
    weights = resize_weights(pixels, start, start + side, samples, filter="centered")
    torch.testing.assert_close(weights.sum(1), torch.ones(samples, dtype=torch.float64), rtol=0, atol=1e-12)
    assert weights.min() > -1e-9


HOSTILE: list[tuple[str, Any, str]] = [
    ("boxes", [float("nan"), 0, 5, 5], "boxes"),
    ("boxes", [0, 0, float("inf"), 5], "boxes"),
    ("boxes", [-float("inf"), 0, 5, 5], "boxes"),
    ("boxes", [0, 0, 0, 5], "boxes"),
    ("boxes", [0, 5, 5, 3], "boxes"),
    ("boxes", [0, 0, 2**21, 5], "boxes"),
    ("boxes", [0, -3e38, 5, 5], "boxes"),
    ("quarter_turns", 4, "quarter_turns"),
    ("quarter_turns", -1, "quarter_turns"),
    ("quarter_turns", 2**40, "quarter_turns"),
    ("blur_sigma_px", float("nan"), "blur_sigma_px"),
    ("blur_sigma_px", -0.5, "blur_sigma_px"),
    ("blur_sigma_px", 257.0, "blur_sigma_px"),
    ("blur_sigma_px", float("inf"), "blur_sigma_px"),
    ("matrix", float("nan"), "matrix"),
    ("matrix", float("inf"), "matrix"),
    ("matrix", 3e38, "matrix"),
    ("orientation", 0, "orientation"),
    ("orientation", 9, "orientation"),
    ("orientation", 257, "orientation"),  # 1 as a byte
]


@pytest.mark.core
@needs_native
@pytest.mark.parametrize(("field", "value", "word"), HOSTILE)
def test_a_hostile_record_is_refused_by_name_and_nothing_is_written(field: str, value: Any, word: str) -> None:
    pictures, batch = a_batch(torch.float32)
    changed = batch[field].clone()
    changed[(3, 1) if field != "orientation" else 3] = torch.tensor(value)
    out = torch.full((7, 3, 3, 40, 33), float("nan"))
    with pytest.raises(ValueError, match=rf"^{word}\[3"):
        render_views(pictures, **(batch | {field: changed}), out=out)
    assert out.isnan().all()


@needs_native
@pytest.mark.parametrize("filter", ["plain", "centered"])
@pytest.mark.parametrize("box", [(-(2.0**20), -(2.0**20), 2.0**20, 2.0**20), (2.0**20 - 1, 3, 2.0**20, 4), (-9000.5, -3, -8999, 50)])
def test_records_at_the_limits_render_as_defined(box: tuple[float, ...], filter: str) -> None:
    case = plain_case(noise(9, 7), box, (2, 1), filter=filter, blur_sigma_px=torch.tensor([[256.0]]))
    truth = case.truth()
    for name in SETS:
        assert_close_in_levels(case.on(name), truth)


GUARDED = """
import ctypes, mmap, sys
import numpy as np, torch
from wherefrom.kernels.render_views import ViewPlan, ViewRequest, instruction_sets

page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
kept = []

def guarded(size, at_end):
    # bytes with a page before them and a page behind that nobody may touch
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    kept.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for offset in (0, (pages + 1) * page):
        assert libc.mprotect(base + offset, page, 0) == 0
    start = page + (pages * page - size if at_end else 0)
    return np.frombuffer(memory, np.uint8, size, start)

rng = np.random.default_rng(0)
sets = instruction_sets()
overrun = int(sys.argv[1])
for trial in range(int(sys.argv[2])):
    height, width = (int(n) for n in rng.choice([1, 2, 3, 5, 6, 11, 21, 22, 37, 64], 2))
    h, w = (int(n) for n in rng.choice([1, 2, 7, 16, 17, 33, 48], 2))
    at_end = bool(trial & 1)
    picture = guarded(height * width * 3, at_end).reshape(height, width, 3)
    picture[:] = trial
    dtype = (torch.uint8, torch.float16, torch.float32)[trial % 3]
    out = torch.from_numpy(guarded(3 * h * w * dtype.itemsize, at_end)).view(dtype).view(1, 1, 3, h, w)
    center, side = rng.uniform(-0.2, 1.2, 2) * [width, height], np.exp(rng.uniform(-2, 1.5, 2)) * [width, height]
    request = ViewRequest(
        boxes=torch.from_numpy(np.concatenate([center - side / 2, center + side / 2])).float().view(1, 1, 4),
        flipped=torch.tensor([[bool(rng.integers(2))]]),
        quarter_turns=torch.tensor([[int(rng.integers(4))]]),
        blur_sigma_px=torch.tensor([[float(rng.choice([0, 1.5]))]]),
        out=out,
    )
    plan = ViewPlan([request], orientation=torch.tensor([int(rng.integers(1, 9))]), instruction_set=sets[trial % len(sets)])
    plan.render_picture(0, picture)
    assert (out == trial % 256).all() or out.float().sub(trial % 256).abs().max() < 0.3, (trial, out)
if overrun:
    ctypes.memset(picture.ctypes.data, 0, picture.size + page)
print("unharmed")
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="guards pages by Linux's mprotect")
@pytest.mark.parametrize("overrun", [False, True])
def test_no_byte_beside_picture_or_view_is_touched(tmp_path: Path, overrun: bool) -> None:
    """Forbidden pages lie before and behind both; the control that writes on into one must die of it."""
    script = tmp_path / "guarded.py"
    script.write_text(GUARDED)
    result = subprocess.run([sys.executable, str(script), str(int(overrun)), "240"], capture_output=True, text=True, check=False)
    assert ("unharmed" in result.stdout) != overrun, result.stderr[-2000:]


@needs_native
@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((4, 5, 4), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((4, 5, 3), np.float32), r"\(H, W, 3\)"),
        (np.zeros((4, 5, 3), np.int8), r"\(H, W, 3\)"),
        (np.zeros((4, 8, 3), np.uint8)[:, ::2], "one piece"),
        (np.zeros((0, 5, 3), np.uint8), "sides of 1"),
    ],
)
def test_a_picture_of_another_kind_is_refused(picture: Any, message: str) -> None:
    plan = ViewPlan([plain_case(noise(4, 5), (0, 0, 5, 4), (2, 2)).request()])
    with pytest.raises(ValueError, match=message):
        plan.render_picture(0, picture)
    with pytest.raises(IndexError, match="numbered 0 to 0"):
        plan.render_picture(1, np.zeros((4, 5, 3), np.uint8))


def fitting() -> dict[str, Any]:
    return {
        "pictures": [noise(9, 8), noise(5, 6)],
        "boxes": torch.tensor([[[0.0, 0, 5, 5]], [[0, 0, 5, 5]]]),
        "flipped": torch.zeros(2, 1, dtype=torch.bool),
        "quarter_turns": torch.zeros(2, 1, dtype=torch.int64),
        "size_px": (4, 3),
    }


@pytest.mark.core
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(2, 4)}, r"boxes has shape \(2, 4\), expected \(B, V, 4\); add the view axis"),
        ({"boxes": torch.zeros(2, 1, 4, dtype=torch.float64)}, "boxes is float64, expected float32"),
        ({"flipped": torch.zeros(2, dtype=torch.bool)}, r"flipped has shape \(2,\), expected \(2, 1\)"),
        ({"quarter_turns": torch.zeros(2, 1)}, "quarter_turns is float32, expected int64 or int32"),
        ({"size_px": 4.5}, r"size_px=4.5: needs sides of 1 or more, \(height, width\), or one for a square"),
        ({"size_px": torch.tensor([4, 3])}, r"size_px=a tensor of shape \(2,\): needs sides of 1 or more"),
        ({"boxes": torch.tensor([[[0.0, 0, 5, 5]]] * 2).requires_grad_()}, "boxes requires a gradient, and rendered views give none"),
        ({"mean": MEAN.clone().requires_grad_(), "std": STD}, "mean requires a gradient, and rendered views give none"),
        ({"out": torch.zeros(2, 1, 3, 4, 3).requires_grad_()}, "out requires a gradient, and rendered views give none"),
        ({"matrix": torch.zeros(2, 1, 4, 3)}, r"matrix has shape \(2, 1, 4, 3\), expected \(2, 1, 3, 4\)"),
        ({"pictures": [noise(9, 8)]}, "1 pictures came with boxes"),
        ({"pictures": [noise(9, 8), noise(5, 6).float()]}, r"pictures\[1\] is float32, expected uint8"),
        ({"pictures": [noise(9, 8), noise(5, 6).permute(2, 0, 1)]}, r"pictures\[1\] has shape \(3, 5, 6\), expected \(H, W, 3\)"),
        ({"pictures": [noise(9, 8), noise(5, 6)[:, ::2]]}, "contiguous"),
        ({"mean": MEAN}, "one of mean and std is None"),
        ({"mean": MEAN, "std": STD, "dtype": torch.uint8}, "leave them out"),
        ({"out": torch.zeros(2, 1, 3, 3, 4)}, r"out has shape \(2, 1, 3, 3, 4\), expected \(2, 1, 3, 4, 3\)"),
        ({"out": torch.zeros(2, 1, 3, 4, 6)[..., ::2]}, "out has strides"),
        ({"dtype": torch.float64}, "out is float64"),
        ({"filter": "cubic"}, "take one of plain, centered"),
        ({"backend": "gpu"}, "take one of auto, native, triton, reference"),
        ({"threads": 0}, "threads=0"),
        ({"size_px": (0, 3)}, "size_px"),
        ({"orientation": torch.ones(3, dtype=torch.uint8), "backend": "auto" if MISSING is None else "reference"}, "orientation"),
    ],
)
def test_messages_say_what_came(change: dict[str, Any], message: str) -> None:
    if MISSING is not None and change.keys() == {"orientation", "backend"}:
        pytest.skip("the compiled kernel checks it")
    render_views(**fitting(), backend="reference")
    with pytest.raises(ValueError, match=message):
        render_views(**({"backend": "reference"} | fitting() | change))


def test_an_empty_batch_and_a_batch_without_views_are_empty() -> None:
    for backend in ("reference", "native")[: 1 if MISSING else 2]:
        for pictures, views in ((0, 2), (2, 0)):
            got = render_views(
                [noise(4, 4)] * pictures,
                torch.zeros(pictures, views, 4),
                flipped=torch.zeros(pictures, views, dtype=torch.bool),
                quarter_turns=torch.zeros(pictures, views, dtype=torch.int64),
                size_px=(3, 5),
                backend=backend,
            )
            assert got.shape == (pictures, views, 3, 3, 5)


def test_without_the_kernel_auto_warns_and_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wherefrom.kernels._native", None)
    assert "gcc 12 or clang" in str(native_missing())
    with pytest.warns(RuntimeWarning, match=r"slow reference: .*not built"):
        got = render_views(**fitting())
    assert torch.equal(got, render_views(**fitting(), backend="reference"))
    with pytest.raises(ValueError, match="not built"):
        render_views(**fitting(), backend="native")


@pytest.mark.core
@needs_native
def test_auto_takes_the_kernel_on_a_cpu_and_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(render_views(**fitting()), render_views(**fitting(), backend="native"))


@pytest.mark.core
def test_triton_is_reached_by_name() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fitting().items()}
    call["pictures"] = [picture.to(device) for picture in call["pictures"]]
    got = render_views(**call, backend="triton")
    assert_close_in_levels(got.cpu(), render_views(**fitting(), backend="reference").double())


@pytest.mark.core
def test_what_lies_on_the_host_goes_to_the_device_in_one_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("wherefrom.kernels.render_views_triton")
    sent: list[int] = []

    def upload(tensors: Any, device: torch.device, upload: Any = module.upload) -> Any:
        sent.append(len(tensors))
        return upload(tensors, device)

    monkeypatch.setattr(module, "upload", upload)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fitting().items()}
    call["pictures"] = [picture.to(device) for picture in call["pictures"]]
    call |= {"mean": torch.full((3,), 0.4), "std": torch.full((3,), 0.2), "dtype": torch.float32}
    plain = render_views(**call, backend="triton")
    assert sent == [5]  # addresses, sizes, orientation, mean, std
    levels = render_views(**{**call, "mean": None, "std": None}, backend="triton")
    torch.testing.assert_close(plain, (levels / 255 - 0.4) / 0.2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_path_casts_and_lays_out_as_asked(dtype: torch.dtype) -> None:
    got = render_views(**fitting(), backend="reference", dtype=dtype, channels_last=True)
    levels = render_views_reference(fitting()["pictures"][1], torch.tensor([[0.0, 0, 5, 5]]), torch.zeros(1), torch.zeros(1), (4, 3))
    assert torch.equal(got[1], (levels.round() if dtype == torch.uint8 else levels).to(dtype))
    assert got.permute(0, 1, 3, 4, 2).is_contiguous()


PATHS = [
    pytest.param("native", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING))),
    "triton",
    "reference",
]


@pytest.mark.parametrize("backend", PATHS)
def test_an_output_that_autograd_still_needs_is_known_to_be_changed(backend: Any) -> None:
    out = torch.full((2, 1, 3, 4, 3), 2.0)
    factor = torch.tensor(3.0, requires_grad=True)
    needed = (factor * out).sum()  # its gradient is the sum of what `out` holds
    render_views(**fitting(), out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needed.backward()


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("whole", [False, True])
def test_a_plan_marks_its_outputs_as_changed(whole: bool) -> None:
    given = fitting()
    outs = [torch.zeros(2, 1, 3, 4, 3) for _ in range(2)]
    plan = ViewPlan([ViewRequest(**{name: given[name] for name in ("boxes", "flipped", "quarter_turns")}, out=out) for out in outs])
    before = [out._version for out in outs]
    if whole:
        plan.render_all(given["pictures"])
    else:
        plan.render_picture(1, given["pictures"][1].numpy())
    assert all(out._version > version for out, version in zip(outs, before, strict=True))


@pytest.mark.parametrize("backend", PATHS)
def test_mirror_and_turns_may_be_left_out_and_one_number_is_a_square(backend: Any) -> None:
    given = {name: value for name, value in fitting().items() if name in ("pictures", "boxes")}
    upright = {"flipped": torch.zeros(2, 1, dtype=torch.bool), "quarter_turns": torch.zeros(2, 1, dtype=torch.int64)}
    expected = render_views(**given, **upright, size_px=(4, 4), backend=backend)
    assert torch.equal(render_views(**given, size_px=4, backend=backend), expected)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_turns_are_integers_of_any_width(dtype: torch.dtype, backend: Any) -> None:
    turns = torch.tensor([[1], [3]])
    expected = render_views(**fitting() | {"quarter_turns": turns}, backend=backend)
    assert torch.equal(render_views(**fitting() | {"quarter_turns": turns.to(dtype)}, backend=backend), expected)
