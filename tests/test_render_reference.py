"""The view kernel's definition against a direct two-dimensional sum, Pillow's resize, SciPy's blur, the maps of geometry.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter
from torch import Tensor

from wherefrom.kernels.render_views_reference import blur_weights, render_views_reference, resize_weights
from wherefrom.pipeline.geometry import map_points, view_to_source

pytestmark = pytest.mark.core


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).integers(0, 256, (height, width, 3), np.uint8))


def render_one(
    picture: Tensor, box: tuple[float, ...], size_px: tuple[int, int], flipped: bool = False, turns: int = 0, **options: object
) -> Tensor:
    return render_views_reference(picture, torch.tensor([box]), torch.tensor([flipped]), torch.tensor([turns]), size_px, **options)[0]


def direct_sum(picture: NDArray[np.float64], box: tuple[float, ...], size_px: tuple[int, int]) -> NDArray[np.float64]:
    """Sum every tap of every output pixel one by one, (h, w, 3)."""
    x0, y0, x1, y1 = box
    scale_y, scale_x = (y1 - y0) / size_px[0], (x1 - x0) / size_px[1]
    reach_y, reach_x = max(scale_y, 1), max(scale_x, 1)
    out = np.empty((*size_px, 3))
    for row in range(size_px[0]):
        for col in range(size_px[1]):
            cy, cx = y0 + (row + 0.5) * scale_y, x0 + (col + 0.5) * scale_x
            total, weight = np.zeros(3), 0.0
            for i in range(math.floor(cy - reach_y) - 1, math.ceil(cy + reach_y) + 1):
                for j in range(math.floor(cx - reach_x) - 1, math.ceil(cx + reach_x) + 1):
                    w = max(0.0, 1 - abs(i + 0.5 - cy) / reach_y) * max(0.0, 1 - abs(j + 0.5 - cx) / reach_x)
                    total += w * picture[min(max(i, 0), picture.shape[0] - 1), min(max(j, 0), picture.shape[1] - 1)]
                    weight += w
            out[row, col] = total / weight
    return out


@given(pixels=st.integers(1, 60), start=st.floats(0, 1), side=st.floats(0, 1), samples=st.integers(1, 70))
def test_resize_weights_sum_to_one_and_are_never_negative(pixels: int, start: float, side: float, samples: int) -> None:
    first = start * pixels
    weights = resize_weights(pixels, first, first + max(side * (pixels - first), 1e-3), samples)
    assert weights.shape == (samples, pixels)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(samples, dtype=torch.float64), rtol=0, atol=1e-12)


@given(pixels=st.integers(1, 40), sigma=st.floats(0.05, 6))
def test_blur_weights_sum_to_one_and_treat_both_ends_alike(pixels: int, sigma: float) -> None:
    weights = blur_weights(pixels, sigma)
    torch.testing.assert_close(weights.sum(1), torch.ones(pixels, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, weights.flip(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("box", [(0, 0, 9, 7), (2.25, 1.5, 6.75, 6.125), (0.125, 3, 9, 3.75), (8.25, 6.375, 9, 7), (4, 4, 4.25, 4.5)])
@pytest.mark.parametrize("size_px", [(3, 5), (11, 4), (1, 1)])
def test_views_equal_the_direct_sum_over_both_axes(box: tuple[float, ...], size_px: tuple[int, int]) -> None:
    picture = noise(7, 9)
    got = render_one(picture, box, size_px).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, direct_sum(picture.double().numpy(), box, size_px), rtol=0, atol=1e-10)


def test_the_whole_picture_at_its_own_size_is_itself() -> None:
    picture = noise(13, 17)
    assert torch.equal(render_one(picture, (0, 0, 17, 13), (13, 17)), picture.permute(2, 0, 1).double())


@given(
    box=st.tuples(*[st.floats(0, 1)] * 4),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    flipped=st.booleans(),
    turns=st.integers(0, 3),
)
def test_a_constant_picture_stays_constant(box: tuple[float, ...], height: int, width: int, flipped: bool, turns: int) -> None:
    (x0, x1), (y0, y1) = sorted((box[0] * 30, box[2] * 30 + 1)), sorted((box[1] * 20, box[3] * 20 + 1))
    view = render_one(torch.full((20, 30, 3), 77, dtype=torch.uint8), (x0, y0, min(x1, 30), min(y1, 20)), (height, width), flipped, turns)
    assert view.shape == (3, height, width)
    torch.testing.assert_close(view, torch.full_like(view, 77), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size_px", [(40, 31), (12, 18)])
def test_pillow_agrees_within_its_rounding(size_px: tuple[int, int]) -> None:
    picture, box = noise(60, 70), (9.25, 8.5, 61.0, 52.75)  # away from the picture's edge, where Pillow drops the outside taps

    def error(reference: Tensor) -> NDArray[np.float64]:
        pillow = Image.fromarray(picture.numpy()).resize(size_px[::-1], Image.Resampling.BILINEAR, box)
        return np.abs(reference.permute(1, 2, 0).numpy() - np.asarray(pillow, np.float64))

    assert error(render_one(picture, box, size_px)).max() <= 1.01  # it rounds between its passes
    shifted = tuple(edge + 0.5 for edge in box)
    assert error(render_one(picture, shifted, size_px)).mean() > 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_undone_as_pillow_does(orientation: int) -> None:
    stored, box = noise(11, 16), (1.5, 2.0, 9.75, 10.5)
    image = Image.fromarray(stored.numpy())
    image.getexif()[0x0112] = orientation
    upright = torch.from_numpy(np.asarray(ImageOps.exif_transpose(image)).copy())
    assert torch.equal(render_one(stored, box, (6, 5), orientation=orientation), render_one(upright, box, (6, 5)))
    if orientation != 1:
        assert not torch.equal(render_one(stored, box, (6, 5)), render_one(upright, box, (6, 5)))


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flipped", [False, True])
def test_a_mirror_comes_before_a_turn_and_both_follow_the_resize(flipped: bool, turns: int) -> None:
    picture, box = noise(20, 24), (2.0, 3.0, 21.0, 18.0)
    size = (6, 8) if turns % 2 else (8, 6)
    upright = render_one(picture, box, (8, 6))
    expected = torch.rot90(upright.flip(-1) if flipped else upright, turns, (-2, -1))
    assert torch.equal(render_one(picture, box, size, flipped, turns), expected)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flipped", [False, True])
def test_every_pixel_shows_the_source_point_that_the_map_names(flipped: bool, turns: int) -> None:
    y, x = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(50) + 0.5, indexing="ij")
    picture = torch.stack([x, y, x + y], -1)  # enlarging reproduces planes exactly
    box, size_px = (5.25, 6.5, 25.0, 21.75), (33, 47)
    view = render_one(picture, box, size_px, flipped, turns)
    maps = view_to_source(torch.tensor(box), torch.tensor(flipped), torch.tensor(turns), size_px)
    rows, cols = torch.meshgrid(torch.arange(33) + 0.5, torch.arange(47) + 0.5, indexing="ij")
    points = map_points(maps, torch.stack([cols, rows], -1).flatten(0, 1)).unflatten(0, size_px)
    torch.testing.assert_close(view[:2].permute(1, 2, 0), points, rtol=0, atol=1e-9)


def test_the_filter_reads_on_beyond_the_box_and_folds_at_the_edge_of_the_picture() -> None:
    picture = torch.zeros(8, 8, 3)
    picture[:, 4:] = 100
    assert (render_one(picture, (0, 0, 4, 8), (2, 2))[:, :, 1] > 0).all()  # sees the bright half outside its box
    assert torch.equal(render_one(picture[:, :4], (0, 0, 4, 8), (2, 2)), torch.zeros(3, 2, 2, dtype=torch.float64))
    weights = resize_weights(8, 0, 8, 2)
    assert weights[0, 0] > weights[0, 1] > 0  # the first pixel carries what falls outside


def test_color_is_the_matrix_then_one_clip_then_blur_then_solarize_then_normalize() -> None:
    picture = noise(30, 30)
    matrix = torch.tensor([[[1.3, -0.2, 0.1, 20.0], [0.1, 0.9, -0.3, -15.0], [0.299, 0.587, 0.114, 0.0]]], dtype=torch.float64)
    mean, std = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64), torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
    plain = render_one(picture, (3.5, 2, 27, 28), (14, 12)).numpy()
    expected = np.clip(np.einsum("rc,chw->rhw", matrix[0, :, :3], plain) + matrix[0, :, 3, None, None].numpy(), 0, 255)
    expected = np.stack([gaussian_filter(channel, 1.3, mode="mirror", radius=4) for channel in expected])
    expected = np.minimum(expected, 255 - expected)
    options = {"matrix": matrix, "blur_sigma_px": torch.tensor([1.3], dtype=torch.float64), "solarized": torch.tensor([True])}
    got = render_one(picture, (3.5, 2, 27, 28), (14, 12), **options)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-10)
    normalized = render_one(picture, (3.5, 2, 27, 28), (14, 12), **options, mean=mean, std=std)
    torch.testing.assert_close((normalized * std[:, None, None] + mean[:, None, None]) * 255, got, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_a_blur_wider_than_the_view_keeps_reflecting(side: int) -> None:
    picture = np.random.Generator(np.random.Philox(1)).random((side, side))
    weights = blur_weights(side, 2.5).numpy()
    np.testing.assert_allclose(
        weights @ picture @ weights.T, gaussian_filter(picture, 2.5, mode="mirror", radius=8) if side > 1 else picture, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": torch.zeros(4, 4)}, r"picture has shape \(4, 4\), expected \(H, W, 3\)"),
        ({"boxes": torch.zeros(4)}, r"boxes has shape \(4,\), expected \(V, 4\)"),
        ({"orientation": 9}, "orientation=9: EXIF knows 1 to 8"),
        ({"mean": torch.zeros(3)}, "one of mean and std is None"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    fitting: dict[str, object] = {"picture": torch.zeros(4, 4, 3), "boxes": torch.tensor([[0.0, 0, 4, 4]])}
    with pytest.raises(ValueError, match=message):
        render_views_reference(**(fitting | change), flipped=torch.zeros(1, dtype=torch.bool), quarter_turns=torch.zeros(1), size_px=(2, 2))  # type: ignore[arg-type]
