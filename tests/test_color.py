"""Color: drawn numbers against their ranges and distributions, the matrix against color operations one after the other."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from wherefrom.pipeline.color import color_matrix, draw_color
from wherefrom.pipeline.draws import Keys, family_word
from wherefrom.pipeline.view_recipe import Center, ColorLaw, ViewFamily
from wherefrom.pipeline.views import Photometric

pytestmark = pytest.mark.core

LAW = ColorLaw(
    brightness=0.4,
    contrast=0.3,
    saturation=0.2,
    hue=0.1,
    jitter_prob=0.8,
    gray_prob=0.2,
    blur_prob=0.5,
    blur_sigma_px=(0.1, 2.0),
    solarize_prob=0.3,
)


def draw(law: ColorLaw | None, count: int = 20_000, views: int = 2, name: str = "f") -> Photometric:
    family = ViewFamily(name=name, views=views, size_px=(8, 8), law=Center(), color=law)
    return draw_color(family, Keys(seed=3, epoch=1, drawn_for=np.arange(count), family=family_word(name)))


def test_factors_are_uniform_in_their_ranges_and_absent_as_often_as_asked() -> None:
    drawn = draw(LAW)
    jittered = drawn.brightness.numpy() != 1
    assert stats.binomtest(int(jittered.sum()), jittered.size, 0.8).pvalue > 0.01
    for name, center, reach in (("brightness", 1, 0.4), ("contrast", 1, 0.3), ("saturation", 1, 0.2), ("hue_rad", 0, 0.2 * math.pi)):
        values = getattr(drawn, name).numpy().astype(np.float64)
        assert stats.kstest(values[jittered], "uniform", (center - reach, 2 * reach)).pvalue > 0.01
        assert (values[~jittered] == center).all()
    blurred = drawn.blur_sigma_px.numpy() > 0
    assert stats.binomtest(int(blurred.sum()), blurred.size, 0.5).pvalue > 0.01
    assert stats.kstest(drawn.blur_sigma_px.numpy()[blurred], "uniform", (0.1, 1.9)).pvalue > 0.01
    for flags, probability in ((drawn.gray, 0.2), (drawn.solarized, 0.3)):
        assert stats.binomtest(int(flags.sum()), flags.numel(), probability).pvalue > 0.01


def test_numbers_of_one_view_and_of_neighboring_views_are_independent() -> None:
    drawn = draw(dataclasses.replace(LAW, jitter_prob=1.0, blur_prob=1.0))
    names = [field.name for field in dataclasses.fields(Photometric)]
    columns = np.concatenate([getattr(drawn, name).numpy().astype(np.float64) for name in names], 1)  # (n, 7 x 2 views)
    correlation = np.corrcoef(columns.T) - np.eye(14)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(len(columns))


def test_recorded_numbers_are_multiples_of_a_millionth() -> None:
    """2^-20: no processor's last bit shows in a record."""
    drawn = draw(LAW, 500)
    for name in ("brightness", "contrast", "saturation", "hue_rad", "blur_sigma_px"):
        scaled = getattr(drawn, name).double() * 2**20
        assert torch.equal(scaled, scaled.round())


def test_a_view_keeps_its_color_whatever_else_is_drawn() -> None:
    few, more = draw(LAW, 10), draw(LAW, 30, views=5)
    for field in dataclasses.fields(Photometric):
        assert torch.equal(getattr(few, field.name), getattr(more, field.name)[:10, :2])
    assert not torch.equal(few.brightness, draw(LAW, 10, name="g").brightness)


def test_no_law_and_a_law_of_nothing_leave_color_alone() -> None:
    nothing = ColorLaw(brightness=0, contrast=0, saturation=0, hue=0, gray_prob=0)
    for law in (None, nothing, dataclasses.replace(LAW, jitter_prob=0, gray_prob=0, blur_prob=0, solarize_prob=0)):
        drawn, unchanged = draw(law, 50), Photometric.unchanged(50, 2)
        for field in dataclasses.fields(Photometric):
            assert torch.equal(getattr(drawn, field.name), getattr(unchanged, field.name)), field.name
    identity = torch.eye(3, 4, dtype=torch.float64).expand(1, 1, 3, 4)
    torch.testing.assert_close(color_matrix(Photometric.unchanged(1, 1)), identity, rtol=0, atol=1e-12)


def one_after_the_other(rgb: NDArray, brightness: float, contrast: float, saturation: float, hue: float, gray: bool) -> NDArray[np.float64]:
    """Colors (n, 3) in 0..255, changed step by step: hue and saturation in YIQ, then gray, then contrast about 128, then brightness."""
    r, g, b = rgb.T.astype(np.float64)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    i, q = 0.596 * r - 0.274 * g - 0.321 * b, 0.211 * r - 0.523 * g + 0.311 * b
    turned = (i + 1j * q) * np.exp(-1j * hue) * saturation
    to_rgb = np.linalg.inv(np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]]))
    colors = np.stack([y, turned.real, turned.imag], -1) @ to_rgb.T
    if gray:
        colors = np.repeat(colors @ np.array([[0.299], [0.587], [0.114]]), 3, axis=1)
    return ((colors - 128) * contrast + 128) * brightness


@given(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2), st.floats(-3.14, 3.14), st.booleans())
def test_matrix_is_the_operations_one_after_the_other(
    brightness: float, contrast: float, saturation: float, hue: float, gray: bool
) -> None:
    as_drawn = [torch.tensor([[value]], dtype=torch.float32) for value in (brightness, contrast, saturation, hue)]
    photometric = dataclasses.replace(
        Photometric.unchanged(1, 1),
        brightness=as_drawn[0],
        contrast=as_drawn[1],
        saturation=as_drawn[2],
        hue_rad=as_drawn[3],
        gray=torch.tensor([[gray]]),
    )
    rgb = np.random.default_rng(0).integers(0, 256, (20, 3))
    matrix = color_matrix(photometric)[0, 0].numpy()
    found = rgb @ matrix[:, :3].T + matrix[:, 3]
    expected = one_after_the_other(rgb, *(value.item() for value in as_drawn), gray)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_order_of_contrast_and_brightness_matters() -> None:
    """The negative control: brightness first, then contrast about 128, is another law."""
    photometric = dataclasses.replace(Photometric.unchanged(1, 1), brightness=torch.tensor([[1.5]]), contrast=torch.tensor([[0.5]]))
    matrix = color_matrix(photometric)[0, 0].numpy()
    mid = matrix[:, :3].sum(1) * 100 + matrix[:, 3]
    np.testing.assert_allclose(mid, ((100 - 128) * 0.5 + 128) * 1.5, atol=0.2)
    assert abs(mid[0] - ((100 * 1.5 - 128) * 0.5 + 128)) > 30


def test_gray_views_have_three_equal_channels_of_rec_601_luma() -> None:
    photometric = dataclasses.replace(Photometric.unchanged(1, 1), gray=torch.tensor([[True]]))
    matrix = color_matrix(photometric)[0, 0]
    torch.testing.assert_close(matrix[:, :3], torch.tensor([[0.299, 0.587, 0.114]], dtype=torch.float64).expand(3, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gray_prob": 1.5}, r"gray_prob=1\.5: a probability lies in \[0, 1\]"),
        ({"brightness": 1.2}, r"brightness=1\.2: the factor is drawn from"),
        ({"hue": 0.6}, r"hue=0\.6: needs 0 to 0\.5 of a turn"),
        ({"blur_sigma_px": (2.0, 1.0)}, r"blur_sigma_px=\(2\.0, 1\.0\): needs 0 < low <= high"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColorLaw(**arguments)
