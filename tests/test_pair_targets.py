"""Pair targets: against brute force in float64 NumPy over single pairs, and the identities of swapping, chaining, mirroring and turning."""

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.pair_loss import pair_loss
from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import CHANNELS, Axes, PairUnits, PositionUnit, Scale
from wherefrom.kernels.roi_align_pairs import roi_align_pairs
from wherefrom.pipeline import geometry

POSITIONS, SCALES, AXES = get_args(PositionUnit), get_args(Scale), get_args(Axes)
OPTIONS = list(itertools.product(POSITIONS, SCALES, AXES))
PICTURE_HW = (480, 640)


@st.composite
def box_sets(draw: st.DrawFn, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, 4), mirrors (N,) and quarter turns (N,)."""
    numbers = [draw(st.tuples(*[st.integers(0, 300)] * 2, *[st.integers(1, 300)] * 2)) for _ in range(count)]
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in numbers], dtype=torch.float32)
    flipped = torch.tensor([draw(st.booleans()) for _ in range(count)])
    turns = torch.tensor([draw(st.integers(0, 3)) for _ in range(count)])
    return boxes, flipped, turns


def one_pair(reference: NDArray, target: NDArray, flipped: bool, turns: int, position: str, scale: str, axes: str) -> NDArray[np.float64]:
    """The targets of one pair, a channel at a time, with the vector carried as a picture would carry it."""
    (rx0, ry0, rx1, ry1), (tx0, ty0, tx1, ty1) = reference.astype(float), target.astype(float)
    dx, dy = (tx0 + tx1 - rx0 - rx1) / 2, (ty0 + ty1 - ry0 - ry1) / 2
    size_r, size_t = (rx1 - rx0, ry1 - ry0), (tx1 - tx0, ty1 - ty0)
    unit = {
        "reference": size_r,
        "picture": PICTURE_HW[::-1],
        "mean": (math.sqrt(size_r[0] * size_t[0]), math.sqrt(size_r[1] * size_t[1])),
    }[position]
    p = [dx / unit[0], dy / unit[1]]
    ratio = [size_t[0] / size_r[0], size_t[1] / size_r[1]]
    if axes == "view":
        if flipped:
            p[0] = -p[0]
        for _ in range(turns):  # a quarter turn counter-clockwise: right goes up, and up is -y
            p = [p[1], -p[0]]
            ratio = ratio[::-1]
    channels = {
        "log_area": [0.5 * math.log(size_t[0] * size_t[1] / (size_r[0] * size_r[1]))],
        "log_sides": [math.log(ratio[0]), math.log(ratio[1])],
        "ratio": ratio,
        "none": [],
    }[scale]
    return np.array(p + channels)


@pytest.mark.core
@pytest.mark.parametrize(("position", "scale", "axes"), OPTIONS)
@settings(max_examples=15)
@given(box_sets())
def test_every_option_agrees_with_brute_force(
    position: PositionUnit, scale: Scale, axes: Axes, made: tuple[Tensor, Tensor, Tensor]
) -> None:
    boxes, flipped, turns = made
    picture_hw = torch.tensor(PICTURE_HW)
    found = pair_targets(
        boxes, flipped=flipped, quarter_turns=turns, units=PairUnits(position=position, scale=scale, axes=axes), picture_hw=picture_hw
    )
    assert found.dtype == torch.float32 and found.shape == (4, 4, len(CHANNELS[scale]))
    every = list(itertools.product(range(4), range(4)))
    expected = np.array(
        [one_pair(boxes[r].numpy(), boxes[t].numpy(), bool(flipped[r]), int(turns[r]), position, scale, axes) for r, t in every]
    )
    np.testing.assert_allclose(found.reshape(16, -1).numpy(), expected, rtol=1e-6, atol=1e-6)
    chosen = torch.tensor([[2, 1], [0, 0], [3, 2]])
    some = pair_targets(
        boxes,
        chosen,
        flipped=flipped,
        quarter_turns=turns,
        units=PairUnits(position=position, scale=scale, axes=axes),
        picture_hw=picture_hw,
    )
    assert torch.equal(some, found[chosen[:, 0], chosen[:, 1]])


@pytest.mark.core
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("position", POSITIONS)
@given(box_sets())
def test_leading_axes_are_a_loop(position: PositionUnit, scale: Scale, made: tuple[Tensor, Tensor, Tensor]) -> None:
    boxes, flipped, turns = (torch.stack([part, part.flip(0)]) for part in made)
    hw = torch.tensor([[480, 640], [333, 500]])
    together = pair_targets(boxes, flipped=flipped, quarter_turns=turns, units=PairUnits(position=position, scale=scale), picture_hw=hw)
    for b in range(2):
        alone = pair_targets(
            boxes[b], flipped=flipped[b], quarter_turns=turns[b], units=PairUnits(position=position, scale=scale), picture_hw=hw[b]
        )
        assert torch.equal(together[b], alone)


@pytest.mark.core
@given(box_sets())
def test_swapping_divides_by_the_scale_and_negates(made: tuple[Tensor, Tensor, Tensor]) -> None:
    """p' = -p size_r / size_t and ln-scale negated, in source axes."""
    found = pair_targets(made[0], units=PairUnits(axes="source", scale="log_sides")).double()
    torch.testing.assert_close(found.transpose(0, 1)[..., :2], -found[..., :2] / found[..., 2:].exp(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.transpose(0, 1)[..., 2:], -found[..., 2:], rtol=0, atol=1e-6)
    ratio = pair_targets(made[0], units=PairUnits(axes="source", scale="ratio"))[..., 2:]
    torch.testing.assert_close(ratio.transpose(0, 1), 1 / ratio)


@pytest.mark.parametrize(("position", "scale", "axes"), OPTIONS)
@given(box_sets())
def test_a_box_relative_to_itself_is_nowhere_else(
    position: PositionUnit, scale: Scale, axes: Axes, made: tuple[Tensor, Tensor, Tensor]
) -> None:
    boxes, flipped, turns = made
    hw = torch.tensor(PICTURE_HW)
    found = pair_targets(
        boxes, flipped=flipped, quarter_turns=turns, units=PairUnits(position=position, scale=scale, axes=axes), picture_hw=hw
    )
    own = torch.diagonal(found, dim1=0, dim2=1).T
    expected = torch.zeros_like(own)
    if scale == "ratio":
        expected[:, 2:] = 1
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


@given(box_sets())
def test_chaining_adds_scaled_positions_and_log_scales(made: tuple[Tensor, Tensor, Tensor]) -> None:
    """p_ac = p_ab + s_ab p_bc."""
    found = pair_targets(made[0], units=PairUnits(axes="source", scale="log_sides")).double()
    for a, b, c in itertools.product(range(4), repeat=3):
        chained = found[a, b, :2] + found[a, b, 2:].exp() * found[b, c, :2]
        torch.testing.assert_close(chained, found[a, c, :2], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found[a, b, 2:] + found[b, c, 2:], found[a, c, 2:], rtol=0, atol=1e-6)
    area = pair_targets(made[0], units=PairUnits(axes="source"))[..., 2].double()
    torch.testing.assert_close(area, found[..., 2:].mean(-1), rtol=0, atol=1e-6)


@given(box_sets())
def test_picture_units_are_antisymmetric_and_add(made: tuple[Tensor, Tensor, Tensor]) -> None:
    found = pair_targets(made[0], units=PairUnits(axes="source", position="picture"), picture_hw=torch.tensor(PICTURE_HW))[..., :2].double()
    torch.testing.assert_close(found.transpose(0, 1), -found, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, :, None] + found[None], found[:, None].expand(4, 4, 4, 2), rtol=0, atol=1e-6)


@given(box_sets())
def test_mean_units_are_antisymmetric(made: tuple[Tensor, Tensor, Tensor]) -> None:
    found = pair_targets(made[0], units=PairUnits(axes="source", position="mean"))[..., :2]
    torch.testing.assert_close(found.transpose(0, 1), -found, rtol=1e-6, atol=1e-6)


def test_reference_units_are_not_antisymmetric() -> None:
    """The negative control of the two identities above."""
    found = pair_targets(torch.tensor([[0.0, 0, 10, 10], [30, 0, 50, 20]]), units=PairUnits(axes="source"))
    assert not torch.allclose(found.transpose(0, 1), -found)


@given(box_sets())
def test_source_axes_know_nothing_of_mirrors_and_turns(made: tuple[Tensor, Tensor, Tensor]) -> None:
    boxes, flipped, turns = made
    plain = pair_targets(boxes, units=PairUnits(axes="source", scale="log_sides"))
    assert torch.equal(plain, pair_targets(boxes, flipped=flipped, quarter_turns=turns, units=PairUnits(axes="source", scale="log_sides")))
    assert torch.equal(plain, pair_targets(boxes, units=PairUnits(axes="view", scale="log_sides")))  # nothing mirrored, nothing turned


@pytest.mark.parametrize("position", POSITIONS)
@given(box_sets())
def test_mirroring_the_reference_negates_x_before_the_turn(position: PositionUnit, made: tuple[Tensor, Tensor, Tensor]) -> None:
    boxes, flipped, turns = made
    hw = torch.tensor(PICTURE_HW)
    one, other = (
        pair_targets(boxes, flipped=f, quarter_turns=turns, units=PairUnits(position=position, scale="log_sides"), picture_hw=hw)
        for f in (flipped, ~flipped)
    )
    sign = torch.where(turns[:, None] % 2 == 1, torch.tensor([1.0, -1]), torch.tensor([-1.0, 1]))[:, None]  # x lies along y after odd turns
    torch.testing.assert_close(one[..., :2] * sign, other[..., :2], rtol=0, atol=0)
    assert torch.equal(one[..., 2:], other[..., 2:])


@given(box_sets())
def test_only_the_references_orientation_counts(made: tuple[Tensor, Tensor, Tensor]) -> None:
    boxes, flipped, turns = made
    first = torch.zeros(4, dtype=torch.bool)
    first[0] = True
    found = pair_targets(boxes, flipped=flipped, quarter_turns=turns)[0]
    others = pair_targets(boxes, flipped=flipped & first, quarter_turns=turns * first)[0]
    assert torch.equal(found, others)


@given(box_sets())
def test_view_axes_show_the_target_where_the_reference_view_shows_it(made: tuple[Tensor, Tensor, Tensor]) -> None:
    """Against the maps: the target's box carried into the reference view's own pixels, in units of that view."""
    boxes, flipped, turns = made
    height, width = 30, 50
    found = pair_targets(boxes, flipped=flipped, quarter_turns=turns, units=PairUnits(scale="log_sides")).double()
    into = geometry.invert(geometry.view_to_source(boxes, flipped, turns, (height, width)))
    seen = geometry.map_boxes(into, boxes.expand(4, 4, 4))  # (reference, target, 4)
    center = (seen[..., :2] + seen[..., 2:]) / 2
    size = torch.tensor([width, height], dtype=torch.float64)
    torch.testing.assert_close(found[..., :2], center / size - 0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[..., 2:], ((seen[..., 2:] - seen[..., :2]) / size).log(), rtol=0, atol=1e-5)


@given(box_sets())
def test_swap_and_chain_hold_after_turning_into_one_frame(made: tuple[Tensor, Tensor, Tensor]) -> None:
    boxes, flipped, turns = made
    same = torch.full_like(flipped, bool(flipped[0])), torch.full_like(turns, int(turns[0]))
    found = pair_targets(boxes, flipped=same[0], quarter_turns=same[1], units=PairUnits(scale="log_sides")).double()
    torch.testing.assert_close(found.transpose(0, 1)[..., :2], -found[..., :2] / found[..., 2:].exp(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0, 1, :2] + found[0, 1, 2:].exp() * found[1, 2, :2], found[0, 2, :2], rtol=1e-5, atol=1e-4)


def test_standardizing_subtracts_and_divides() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [30, 5, 50, 25]])
    plain = pair_targets(boxes)
    mean, std = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 8])
    torch.testing.assert_close(pair_targets(boxes, units=PairUnits(mean=mean, std=std)), (plain - mean) / std)
    torch.testing.assert_close(pair_targets(boxes, units=PairUnits(std=std)), plain / std)


def test_far_boxes_lose_nothing_to_float32() -> None:
    """Centers near 2^14 with quarter pixels: in float32 arithmetic their difference over a one-pixel box would be off."""
    boxes = torch.tensor([[16000.25, 0, 16001.25, 1], [16003.0, 0, 16004.0009765625, 1]])
    assert pair_targets(boxes)[0, 1, 0].item() == np.float32(16003.50048828125 - 16000.75)


BOXES = torch.tensor([[0.0, 0, 10, 10], [30, 5, 50, 25]])


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxes": torch.zeros(4)}, r"boxes has shape \(4,\), expected \(\.\.\., N, 4\)"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes has shape \(2, 5\)"),
        ({"units": PairUnits(position="picture")}, 'picture_hw is None, position="picture" divides by it'),
        ({"picture_hw": torch.zeros(3, 2)}, r"picture_hw has shape \(3, 2\), expected \(2,\)"),
        ({"flipped": torch.zeros(3)}, r"flipped has shape \(3,\), expected \(2,\) as boxes"),
        ({"quarter_turns": torch.zeros(2, 1)}, r"quarter_turns has shape \(2, 1\), expected \(2,\) as boxes"),
        ({"pairs": torch.zeros(2, 3, dtype=torch.long)}, r"pairs has shape \(2, 3\), expected \(P, 2\)"),
        (
            {"picture_hw": (480, 640, 3)},
            r"picture_hw=\(480, 640, 3\): needs \(height, width\) of all pictures, one number for a square, or a",
        ),
        ({"picture_hw": 0}, "picture_hw=0: needs"),
        ({"quarter_turns": torch.full((2,), 0.9)}, "quarter_turns is float32, expected int64 or int32 or int16 or int8 or uint8"),
        ({"flipped": torch.ones(2)}, "flipped is float32, expected bool"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pair_targets(**({"boxes": BOXES} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.core
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": "target"}, "position='target': take one of reference, picture, mean"),
        ({"scale": "area"}, "scale='area': take one of log_area, log_sides, ratio, none"),
        ({"axes": "picture"}, "axes='picture': take one of view, source"),
        ({"mean": torch.zeros(4)}, "mean has shape (4,), expected (3,), one a channel"),
        ({"std": [1.0, 1.0, 1.0]}, "std=[1.0, 1.0, 1.0]: needs a tensor (3,), one number a channel"),
        ({"scale": "ratio", "std": torch.ones(3)}, "std has shape (3,), expected (4,), one a channel"),
    ],
)
def test_units_check_themselves(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        PairUnits(**settings)
    assert str(caught.value) == message


@pytest.mark.core
def test_a_word_in_the_place_of_units_is_refused_by_each_call() -> None:
    a, weight = torch.ones(len(BOXES), 4), torch.ones(3, 4)
    calls: list[Callable[[Any], object]] = [
        lambda units: pair_targets(BOXES, units=units),
        lambda units: pair_loss(a[None], a[None], BOXES[None], weight=weight, output_bias=weight[:, 0], units=units),
        lambda units: roi_align_pairs(torch.zeros(1, 3, 3, 1), BOXES[None], frame_hw=64, out_hw=1, units=units),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^units='picture': needs PairUnits, e\.g\. PairUnits\(position='reference'\)$"):
            call("picture")


@pytest.mark.core
@pytest.mark.parametrize("scale", SCALES)
def test_units_name_as_many_channels_as_targets_have(scale: Scale) -> None:
    assert pair_targets(BOXES, units=PairUnits(scale=scale)).shape[-1] == len(PairUnits(scale=scale).channels)


@pytest.mark.core
def test_one_picture_size_is_that_of_all_and_one_number_is_a_square() -> None:
    """By each call that takes it; sides swapped make another result."""
    boxes, units = torch.stack([BOXES, BOXES + 7]), PairUnits(position="picture")
    a, weight, tokens = torch.ones(2, 2, 4), torch.ones(3, 4), torch.zeros(2, 3, 3, 1)
    calls: list[Callable[[Any], Tensor]] = [
        lambda hw: pair_targets(boxes, units=units, picture_hw=hw),
        lambda hw: pair_loss(a, a, boxes, weight=weight, output_bias=weight[:, 0], units=units, picture_hw=hw).channel_loss,
        lambda hw: roi_align_pairs(tokens, boxes, frame_hw=64, out_hw=1, units=units, picture_hw=hw)[1],
    ]
    for call in calls:
        assert torch.equal(call((30, 50)), call(torch.tensor([[30, 50], [30, 50]])))
        assert torch.equal(call(30), call((30, 30)))
        assert not torch.allclose(call((30, 50)), call((50, 30)))
