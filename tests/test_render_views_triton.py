"""The view kernel in Triton against the float64 reference; on a machine without a GPU its interpreter runs the same source.

Outputs are poisoned before, and lie amid poisoned memory that must stay as it was. Bars are levels of 255, before normalization.
"""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from wherefrom.kernels import render_views_triton as module
from wherefrom.kernels.dispatch import interpreted
from wherefrom.kernels.render_views_reference import render_views_reference
from wherefrom.kernels.render_views_triton import render_views_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT_BAR, BYTE_BAR = 2e-3, 0.51
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
WAYS = [(flipped, turns) for flipped in (False, True) for turns in range(4)]


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).integers(0, 256, (height, width, 3), np.uint8))


def poisoned(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Return a tensor inside a larger one, all of NaN or 77, and the larger one; the inner one's strides are nobody's habit."""
    b, v, c, h, w = shape
    poison = float("nan") if dtype.is_floating_point else 77
    if channels_last:
        around = torch.full((b, v, h, w + 2, c), poison, dtype=dtype, device=DEVICE)
        return around[:, :, :, 1:-1].permute(0, 1, 4, 2, 3), around
    around = torch.full((b, v + 1, c, h + 1, w + 2), poison, dtype=dtype, device=DEVICE)
    return around[:, :-1, :, 1:, 1:-1], around


def render(
    pictures: Sequence[Tensor],
    boxes: Tensor,
    size_px: tuple[int, int],
    *,
    orientation: Tensor | None = None,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    filter: str = "plain",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    blurred: Tensor | None = None,
    **color: Tensor,
) -> Tensor:
    """Render as `render_views` would hand it on; whatever was not written stays NaN or fails here."""
    way = boxes.shape[:2]
    lying = [picture.to(DEVICE).contiguous() for picture in pictures]
    out, around = poisoned((*way, 3, *size_px), dtype, channels_last)
    options = {name: color[name].to(DEVICE) if name in color else None for name in ("matrix", "blur_sigma_px", "solarized", "mean", "std")}
    render_views_triton(
        torch.tensor([picture.data_ptr() for picture in lying], device=DEVICE),
        torch.tensor([picture.shape[:2] for picture in lying], dtype=torch.int32, device=DEVICE),
        orientation=(torch.ones(way[0]) if orientation is None else orientation).to(DEVICE, torch.uint8),
        boxes=boxes.to(DEVICE),
        flipped=(torch.zeros(way, dtype=torch.bool) if flipped is None else flipped).to(DEVICE),
        quarter_turns=(torch.zeros(way, dtype=torch.int64) if quarter_turns is None else quarter_turns).to(DEVICE),
        **options,
        size_px=size_px,
        filter=filter,
        out=out,
        blurred=blurred,
    )
    written = out.cpu().clone()
    out.fill_(float("nan") if dtype.is_floating_point else 77)
    assert bool((around.isnan() if dtype.is_floating_point else around == 77).all()), "memory beside the views was written"
    return written


def reference(
    pictures: Sequence[Tensor],
    boxes: Tensor,
    size_px: tuple[int, int],
    *,
    orientation: Tensor | None = None,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    **options: Any,
) -> Tensor:
    way = boxes.shape[:2]
    flipped = torch.zeros(way, dtype=torch.bool) if flipped is None else flipped
    quarter_turns = torch.zeros(way, dtype=torch.int64) if quarter_turns is None else quarter_turns
    views = []
    for b, picture in enumerate(pictures):
        each = {name: option[b] if name not in ("mean", "std", "filter") else option for name, option in options.items()}
        exif = 1 if orientation is None else int(orientation[b])
        views.append(render_views_reference(picture, boxes[b], flipped[b], quarter_turns[b], size_px, orientation=exif, **each))
    return torch.stack(views)


def assert_close(got: Tensor, expected: Tensor, bar: float | Tensor) -> None:
    excess = (got.double() - expected).abs() - bar
    assert bool((excess <= 0).all()), f"the worst error is {float(excess.max())} above its bar"  # NaN fails as well


def random_boxes(random: torch.Generator, pictures: Sequence[Tensor], orientation: Tensor, views: int, beyond_px: float = 0) -> Tensor:
    """Return boxes (B, V, 4) of every size and place, down to a hundredth of a pixel, reaching up to `beyond_px` out of the pictures."""
    upright = torch.tensor([picture.shape[1::-1] if o < 5 else picture.shape[:2] for picture, o in zip(pictures, orientation, strict=True)])
    places = torch.rand(len(pictures), views, 2, 2, generator=random).sort(2).values
    edges = places * (upright[:, None, None] + 2 * beyond_px) - beyond_px
    edges[:, :, 1] = torch.maximum(edges[:, :, 1], edges[:, :, 0] + 0.01)
    return edges.flatten(2)


def random_color(random: torch.Generator, way: tuple[int, int]) -> dict[str, Tensor]:
    """Return color that clips some pixels; half the views blur, half are solarized."""
    return {
        "matrix": torch.eye(3, 4) + torch.randn(*way, 3, 4, generator=random) * torch.tensor([0.3, 0.3, 0.3, 30.0]),
        "blur_sigma_px": torch.rand(way, generator=random) * 1.9 + 0.1 * (torch.rand(way, generator=random) < 0.5),
        "solarized": torch.rand(way, generator=random) < 0.5,
    }


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    sides=st.lists(st.tuples(st.integers(1, 28), st.integers(1, 28)), min_size=2, max_size=2),
    size_px=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    beyond_px=st.sampled_from([0.0, 0.0, 5.0]),
    colored=st.booleans(),
)
def test_every_view_of_ragged_pictures_equals_the_reference(
    seed: int, sides: list[tuple[int, int]], size_px: tuple[int, int], beyond_px: float, colored: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    pictures = [noise(*side, seed=i) for i, side in enumerate(sides)]
    options: dict[str, Any] = {
        "orientation": torch.randint(1, 9, (2,), generator=random),
        "flipped": torch.rand(2, 2, generator=random) < 0.5,
        "quarter_turns": torch.randint(4, (2, 2), generator=random),
    }
    if colored:
        options |= random_color(random, (2, 2))
    boxes = random_boxes(random, pictures, options["orientation"], 2, beyond_px)
    assert_close(render(pictures, boxes, size_px, **options), reference(pictures, boxes, size_px, **options), FLOAT_BAR)


@pytest.fixture(scope="module")
def every_way() -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Eight pictures, one an EXIF orientation, each seen in every mirror and turn."""
    pictures, orientation = [noise(11 + i, 21 - i, seed=i) for i in range(8)], torch.arange(1, 9)
    boxes = random_boxes(torch.Generator().manual_seed(3), pictures, orientation, 8)
    flipped, turns = (torch.tensor(column).expand(8, 8) for column in zip(*WAYS, strict=True))
    return pictures, boxes, {"orientation": orientation, "flipped": flipped, "quarter_turns": turns}


def test_every_orientation_mirror_and_turn_equals_the_reference(every_way: tuple[list[Tensor], Tensor, dict[str, Tensor]]) -> None:
    pictures, boxes, ways = every_way
    assert_close(render(pictures, boxes, (5, 9), **ways), reference(pictures, boxes, (5, 9), **ways), FLOAT_BAR)


@pytest.mark.core
@pytest.mark.parametrize("mistake", ["a hundredth of a pixel", "another orientation", "mirror forgotten", "turned the other way"])
def test_the_bar_sees_the_nearest_mistake_in_every_view_it_concerns(
    every_way: tuple[list[Tensor], Tensor, dict[str, Tensor]], mistake: str
) -> None:
    pictures, boxes, ways = every_way
    told, wrong = dict(ways), boxes
    if mistake == "a hundredth of a pixel":
        wrong = boxes + 0.01
    elif mistake == "another orientation":
        told["orientation"] = torch.tensor([2, 1, 4, 3, 6, 5, 8, 7])
    elif mistake == "mirror forgotten":
        told["flipped"] = torch.zeros_like(ways["flipped"])
    else:
        told["quarter_turns"] = -ways["quarter_turns"]
    concerned = {"mirror forgotten": ways["flipped"], "turned the other way": ways["quarter_turns"] % 2 == 1}.get(mistake)
    worst = (reference(pictures, wrong, (5, 9), **told) - reference(pictures, boxes, (5, 9), **ways)).abs().flatten(2).amax(-1)
    assert bool((worst[slice(None) if concerned is None else concerned] > 10 * FLOAT_BAR).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["planar", "channels last"])
def test_all_photometrics_in_every_output_equal_the_reference(dtype: torch.dtype, channels_last: bool) -> None:
    random = torch.Generator().manual_seed(1)
    pictures = [noise(17, 23), noise(9, 14, seed=1)]
    options: dict[str, Any] = {"flipped": torch.rand(2, 3, generator=random) < 0.5} | random_color(random, (2, 3))
    if dtype.is_floating_point:
        options |= {"mean": MEAN, "std": STD}
    boxes = random_boxes(random, pictures, torch.ones(2), 3)
    got = render(pictures, boxes, (7, 10), dtype=dtype, channels_last=channels_last, **options)
    expected = reference(pictures, boxes, (7, 10), **options)
    bar = BYTE_BAR if dtype == torch.uint8 else FLOAT_BAR / 255 / float(STD.min())
    # Triton's interpreter truncates to bfloat16, GPUs round: one unit in the last place serves both
    unit = torch.finfo(dtype).eps * expected.abs() if dtype in (torch.float16, torch.bfloat16) else 0
    assert_close(got, expected, bar + unit)


@pytest.mark.parametrize("changed", ["matrix", "blur_sigma_px", "solarized"])
def test_the_bars_see_small_mistakes_in_color(changed: str) -> None:
    random = torch.Generator().manual_seed(1)
    pictures = [noise(17, 23)]
    options, boxes = random_color(random, (1, 3)), random_boxes(random, pictures, torch.ones(1), 3)
    wrong = ~options[changed] if changed == "solarized" else options[changed] * 1.01
    error = (reference(pictures, boxes, (7, 10), **(options | {changed: wrong})) - reference(pictures, boxes, (7, 10), **options)).abs()
    assert error.max() > BYTE_BAR / 2  # and so a hundred times the other bar


def test_naming_the_views_that_blur_changes_no_bit() -> None:
    random = torch.Generator().manual_seed(2)
    pictures = [noise(12, 15), noise(8, 9, seed=1)]
    boxes, options = random_boxes(random, pictures, torch.ones(2), 2), random_color(random, (2, 2))
    options["blur_sigma_px"] = torch.tensor([[0.7, 0.0], [0.0, 1.4]])
    unnamed = render(pictures, boxes, (6, 5), **options)
    assert torch.equal(render(pictures, boxes, (6, 5), blurred=torch.tensor([0, 3]), **options), unnamed)
    options["blur_sigma_px"] = torch.zeros(2, 2)
    assert torch.equal(render(pictures, boxes, (6, 5), blurred=torch.tensor([], dtype=torch.int64), **options)[0, 1], unnamed[0, 1])


@pytest.mark.parametrize(("size_px", "sigma"), [((1, 1), 1.3), ((1, 6), 2.5), ((3, 2), 4.0), ((9, 4), 1 / 3), ((6, 6), 2.0000001)])
def test_blurs_wider_than_the_view_and_at_whole_radii_equal_the_reference(size_px: tuple[int, int], sigma: float) -> None:
    pictures, boxes = [noise(14, 11)], torch.tensor([[[0.5, 1, 10, 13.25]]])
    options = {"blur_sigma_px": torch.tensor([[sigma]])}
    assert_close(render(pictures, boxes, size_px, **options), reference(pictures, boxes, size_px, **options), FLOAT_BAR)


def ramp_errors(filter: str) -> Tensor:
    """Return how far (px) each pixel of views of a ramp lies from the coordinate it shows, supports that leave the picture left out."""
    x = torch.arange(60).expand(60, 60)
    pictures = [torch.stack([4 * x, 4 * x.T, 2 * (x + x.T)], -1).to(torch.uint8)]
    boxes = torch.tensor([[[4.0, 4.5, 16.1, 19.3], [5.25, 6, 33, 29], [4, 4, 55.5, 41], [9, 8, 14, 13]]])
    shown = render(pictures, boxes, (10, 10), filter=filter)[0, :, :2] / 4 + 0.5
    step = (boxes[0, :, 2:] - boxes[0, :, :2]) / 10
    places = boxes[0, :, None, :2] + (torch.arange(10)[:, None] + 0.5) * step[:, None]  # (V, 10, 2)
    return torch.stack([shown[:, 0] - places[:, None, :, 0], shown[:, 1] - places[:, :, None, 1]]).abs()


def test_the_centered_filter_shows_every_coordinate_where_it_is_and_the_plain_one_nearly() -> None:
    assert ramp_errors("centered").max() <= 1e-4
    assert 0.02 < ramp_errors("plain").max() <= 0.087


@pytest.mark.core
def test_the_centered_filter_equals_the_reference() -> None:
    random = torch.Generator().manual_seed(5)
    pictures, orientation = [noise(25, 31), noise(7, 40, seed=1)], torch.tensor([1, 6])
    boxes = random_boxes(random, pictures, orientation, 4, 3)
    boxes[0, 0] = torch.tensor([1.0, 2, 9.0000001, 10.000001])  # shrinks by a millionth: one tap has nearly all the weight
    expected = reference(pictures, boxes, (8, 8), orientation=orientation, filter="centered")
    assert_close(render(pictures, boxes, (8, 8), orientation=orientation, filter="centered"), expected, FLOAT_BAR)
    assert (reference(pictures, boxes, (8, 8), orientation=orientation) - expected).abs().max() > 1


def test_views_of_several_tiles_are_the_same_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, boxes = [noise(30, 50)], torch.tensor([[[1.5, 2, 48, 29.25], [0, 0, 20, 30]]])
    options = {"quarter_turns": torch.tensor([[0, 1]]), "blur_sigma_px": torch.tensor([[0.4, 0]])}
    whole = render(pictures, boxes, (19, 35), **options)
    assert_close(whole, reference(pictures, boxes, (19, 35), **options), FLOAT_BAR)
    for tile in (module.TILE, (16, 16)):
        monkeypatch.setattr(module, "_tile", lambda size_px, tile=tile: tile)
        assert torch.equal(render(pictures, boxes, (19, 35), **options), whole)


@pytest.mark.core
@pytest.mark.parametrize("sides", [(1, 1), (1, 600), (90, 1), (3, 8000)], ids=str)
@pytest.mark.parametrize("size_px", [(1, 1), (2, 5)], ids=str)
def test_extreme_pictures_and_views_equal_the_reference(sides: tuple[int, int], size_px: tuple[int, int]) -> None:
    height, width = sides
    thin = torch.tensor([width - 1 + 0.37, 0.25, width - 1 + 0.371, 0.9])  # a thousandth of a pixel, far from the origin
    far = torch.tensor([max(width - 11.5, 0), 0, width - 0.125, height])
    pictures, boxes = [noise(height, width)], torch.stack([thin, far])[None]
    assert_close(render(pictures, boxes, size_px), reference(pictures, boxes, size_px), FLOAT_BAR)


def test_a_whole_long_picture_in_one_pixel_is_its_weighted_mean() -> None:
    pictures, boxes = [noise(1, 200)], torch.tensor([[[0.0, 0, 200, 1]]])
    assert_close(render(pictures, boxes, (1, 1)), reference(pictures, boxes, (1, 1)), FLOAT_BAR)


def test_the_bar_sees_places_in_float32() -> None:
    pictures, boxes = [noise(3, 8000)], torch.tensor([[[7599.3, 0, 7999.8, 3]]])
    nearby = boxes + torch.tensor([2.0**-11, 0, 2.0**-11, 0])  # a unit in the last place of float32 there
    assert (reference(pictures, nearby, (2, 500)) - reference(pictures, boxes, (2, 500))).abs().max() > 10 * FLOAT_BAR


@pytest.mark.core
def test_packed_numbers_come_back_bit_for_bit_and_aligned() -> None:
    numbers = [
        torch.randn(2, 3, 4),
        torch.tensor([True, False, True]),
        torch.arange(5),
        torch.tensor([], dtype=torch.int32),
        torch.randn(4, 2).mT,
        torch.tensor(7, dtype=torch.uint8),
    ]
    block = module.pack(numbers, pinned=False)
    parts = module.unpack(block, numbers)
    for number, part in zip(numbers, parts, strict=True):
        assert part.dtype == number.dtype and torch.equal(part, number) and part.is_contiguous()
        assert (part.data_ptr() - block.data_ptr()) % 16 == 0 or not part.numel()
    block.copy_(module.pack([number.clone().zero_() for number in numbers], pinned=False))
    assert not any(part.any() for part in parts)  # they are views of the block


def untouched_memory(size: int) -> Tensor:
    """Return bytes of which only those take memory that are touched."""
    no_reserve = 0x4000  # MAP_NORESERVE of Linux
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve), dtype=torch.uint8)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has no memory that is there for the asking")
def test_pictures_and_views_beyond_two_to_the_31_are_reached() -> None:
    height, width = 29_000, 25_000
    far = untouched_memory(height * width * 3).view(height, width, 3)
    corner = noise(9, 12)
    far[-9:, -12:] = corner
    far[-10, -13:], far[-9:, -13] = far[-9, -13:], corner[:, 0]
    assert (height - 9) * width * 3 > 2**31
    out = untouched_memory(2**31 + 600).as_strided((2, 1, 3, 5, 4), (2**31 + 7, 3, 100, 10, 1))
    boxes = torch.tensor([[[0.0, 0, 4, 5]], [[width - 10, height - 8, width - 2, height - 1]]])
    render_views_triton(
        torch.tensor([corner.data_ptr(), far.data_ptr()]),
        torch.tensor([corner.shape[:2], far.shape[:2]], dtype=torch.int32),
        orientation=torch.ones(2, dtype=torch.uint8),
        boxes=boxes,
        flipped=torch.zeros(2, 1, dtype=torch.bool),
        quarter_turns=torch.zeros(2, 1, dtype=torch.int64),
        matrix=None,
        blur_sigma_px=None,
        solarized=None,
        mean=None,
        std=None,
        size_px=(5, 4),
        filter="plain",
        out=out,
    )
    assert_close(out[:1], reference([corner], boxes[:1], (5, 4)), BYTE_BAR)
    assert_close(out[1:], reference([corner], torch.tensor([[[2.0, 1, 10, 8]]]), (5, 4)), BYTE_BAR)


def test_hostile_numbers_end_and_touch_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreted():  # it would take hours over what a GPU does in milliseconds
        monkeypatch.setattr(module, "OVERHANG_PX", tl.constexpr(9))
        monkeypatch.setattr(module, "WIDEST_BLUR_PX", tl.constexpr(9))
    bad, huge = float("nan"), 1e30
    hostile = [[bad] * 4, [-huge, -huge, huge, huge], [0, 0, float("inf"), 2], [6, 6, 1, 1], [huge, 0, huge, 9], [2, 2, 2, 2], [1, 1, 8, 8]]
    views = len(hostile)
    options: dict[str, Any] = {
        "orientation": torch.tensor([200]),
        "flipped": torch.zeros(1, views, dtype=torch.bool),
        "quarter_turns": torch.tensor([[0, -1, 1000, 2**62, 3, 2, 0]]),
        "matrix": torch.eye(3, 4).repeat(1, views, 1, 1),
        "blur_sigma_px": torch.tensor([[bad, -1, huge, 1e-30, float("inf"), 0.2, 0]]),
        "solarized": torch.zeros(1, views, dtype=torch.bool),
    }
    pictures, boxes = [noise(10, 10)], torch.tensor([hostile])
    with np.errstate(invalid="ignore", over="ignore"):  # the interpreter says so where a GPU goes on
        together = render(pictures, boxes, (3, 4), **options)
        sound = {name: option[:, -1:] if name != "orientation" else option for name, option in options.items()}
        assert torch.equal(render(pictures, boxes[:, -1:], (3, 4), **sound), together[:, -1:])
    assert together[:, [1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.core
@pytest.mark.parametrize(("samples", "views"), [(0, 2), (2, 0)])
def test_nothing_to_render_is_rendered(samples: int, views: int) -> None:
    assert render([noise(3, 4)] * samples, torch.zeros(samples, views, 4), (2, 2)).shape == (samples, views, 3, 2, 2)


@pytest.mark.core
def test_every_launch_states_every_argument_once() -> None:
    for launch in module.launches():
        assert sorted([*launch.types, *launch.constants]) == sorted(launch.kernel.arg_names)
        assert launch.options["enable_fp_fusion"] is True
