"""A record as JSON and back: the same bits in every tensor, the same pixels in every renderer, and one line for whatever is no record."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wherefrom.pipeline import ColorLaw, Independent, Paired, Record, ViewFamily, ViewRecipe, draw_records, make_renderer
from wherefrom.pipeline.render.choose import renderer_entry
from wherefrom.pipeline.render.renderer import render_checked
from wherefrom.pipeline.views import Photometric, ViewGeometry

pytestmark = pytest.mark.core

SIZES = np.array([[90, 120], [70, 64], [64, 100]], np.int32)
COLOR = ColorLaw(jitter_prob=1, gray_prob=0.5, blur_prob=0.5, solarize_prob=0.5)


def recipe(snap: str = "pixel") -> ViewRecipe:
    pair = ViewFamily(
        name="pair", views=2, size_px=(24, 40), law=Paired(), mirror="view", turns=True, color=COLOR, snap=snap, min_side_px=4
    )
    one = ViewFamily(name="ein Blick", views=3, size_px=16, law=Independent(), color=COLOR, snap=snap, min_side_px=4)
    return ViewRecipe(families=(pair, one), pixels="uint8")


def drawn(seed: int = 5, snap: str = "pixel") -> tuple[Record, ...]:
    orientation = np.array([1, 6, 3], np.uint8)
    return draw_records(recipe(snap), seed=seed, epoch=2, drawn_for=np.arange(3), source_size=SIZES, stored_orientation=orientation)


def leaves(record: Any) -> dict[str, Any]:
    """Return all tensors and words of a record by name, those of its parts included."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        found |= leaves(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def assert_same_bits(ours: Record, theirs: Record) -> None:
    ours_leaves, theirs_leaves = leaves(ours), leaves(theirs)
    assert ours_leaves.keys() == theirs_leaves.keys()
    for name, value in ours_leaves.items():
        other = theirs_leaves[name]
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (other.dtype, other.shape), name
            assert value.numpy().tobytes() == other.numpy().tobytes(), name
        else:
            assert (type(value), value) == (type(other), other), name


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any record that can be made of finite numbers: none that a law would draw, none that a renderer would take."""
    b, v = draw(st.integers(0, 3)), draw(st.integers(0, 3))

    def tensor(numbers: st.SearchStrategy[Any], dtype: torch.dtype, *shape: int) -> torch.Tensor:
        count = int(np.prod(shape))
        return torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count)), dtype=dtype).view(shape)

    corner = tensor(st.floats(-(2.0**100), 2.0**100, width=32), torch.float32, b, v, 2)
    geometry = ViewGeometry(
        boxes=torch.cat([corner, corner.abs() * 2 + 1], -1),
        flipped=tensor(st.booleans(), torch.bool, b, v),
        quarter_turns=tensor(st.integers(0, 3), torch.int64, b, v),
        source_size=tensor(st.integers(1, 2**31 - 1), torch.int32, b, 2),
        stored_orientation=tensor(st.integers(1, 8), torch.uint8, b),
        sample=tensor(INT64, torch.int64, b),
        drawn_for=tensor(INT64, torch.int64, b),
        view=tensor(INT64, torch.int64, v),
        family=draw(st.text()),
        size_px=(draw(st.integers(1, 4096)), draw(st.integers(1, 4096))),
        seed=draw(st.integers(0, 2**64 - 1)),
        epoch=draw(st.integers(0, 2**24 - 1)),
    )
    factors = {name: tensor(FLOATS, torch.float32, b, v) for name in ("brightness", "contrast", "saturation", "hue_rad", "blur_sigma_px")}
    flags = {name: tensor(st.booleans(), torch.bool, b, v) for name in ("gray", "solarized", "valid", "accepted")}
    photometric = Photometric(**factors, gray=flags["gray"], solarized=flags["solarized"])
    return Record(geometry=geometry, photometric=photometric, valid=flags["valid"], accepted=flags["accepted"])


@settings(max_examples=60)
@given(records())
def test_any_record_comes_back_from_json_bit_for_bit(record: Record) -> None:
    text = record.to_json()
    assert "\n" not in text
    again = Record.from_json(text)
    assert_same_bits(again, record)
    assert again.to_json() == text


def test_one_bit_that_differs_is_noticed() -> None:
    record = drawn()[0]
    boxes = record.geometry.boxes.clone()
    boxes.view(torch.int32)[1, 1, 2] += 1
    other = dataclasses.replace(record, geometry=dataclasses.replace(record.geometry, boxes=boxes))
    with pytest.raises(AssertionError, match="boxes"):
        assert_same_bits(Record.from_json(other.to_json()), record)


@pytest.mark.parametrize("snap", ["pixel", "none"])
def test_views_of_a_record_from_json_are_the_same_pixels(cpu_renderer: str, snap: str, jpeg_bytes: Callable[..., bytes]) -> None:
    if snap not in renderer_entry(cpu_renderer).snaps:
        pytest.skip(f"{cpu_renderer} cuts other boxes")
    rng = np.random.default_rng(0)
    stored = [(90, 120), (64, 70), (64, 100)]  # the second is turned by its EXIF orientation
    pictures = [
        jpeg_bytes(rng.integers(0, 256, (*size, 3), np.uint8), exif_orientation=o) for size, o in zip(stored, (1, 6, 3), strict=True)
    ]
    encoded = [np.frombuffer(picture, np.uint8) for picture in pictures]
    renderer = make_renderer(recipe(snap), cpu_renderer, threads=0)
    try:
        original = drawn(snap=snap)
        rendered = render_checked(renderer, recipe(snap), encoded, original)
        again = render_checked(renderer, recipe(snap), encoded, [Record.from_json(record.to_json()) for record in original])
        other = render_checked(renderer, recipe(snap), encoded, drawn(seed=6, snap=snap))
        assert not rendered.failed
        for first, second, third in zip(rendered.pixels, again.pixels, other.pixels, strict=True):
            assert torch.equal(first, second)
            assert not torch.equal(first, third)
    finally:
        renderer.close()


def test_a_number_that_json_cannot_say_is_refused_by_name() -> None:
    record = drawn()[0]
    hue = record.photometric.hue_rad.clone()
    hue[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^hue_rad holds a number that is not finite"):
        dataclasses.replace(record, photometric=dataclasses.replace(record.photometric, hue_rad=hue)).to_json()


def test_a_number_written_by_hand_is_the_nearest_float32() -> None:
    plain = json.loads(drawn()[0].to_json())
    plain["brightness"][0][0] = 0.9
    brightness = Record.from_json(json.dumps(plain)).photometric.brightness
    assert brightness[0, 0] == torch.tensor(0.9)


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(drawn()[0].to_json()) | fields)


def without(name: str) -> str:
    plain = json.loads(drawn()[0].to_json())
    del plain[name]
    return json.dumps(plain)


HOSTILE: dict[str, tuple[Callable[[], str], str]] = {
    "nothing": (lambda: "", "no JSON"),
    "words": (lambda: "a record", "no JSON"),
    "a list": (lambda: "[1]", "holds list, expected an object"),
    "lists without end": (lambda: "[" * 200_000, "without end"),
    "half a record": (lambda: drawn()[0].to_json()[:100], "no JSON"),
    "another version": (lambda: changed(wherefrom_record=2), "wherefrom_record is 2, this version of the library reads 1"),
    "true for a version": (lambda: changed(wherefrom_record=True), "wherefrom_record is True"),
    "no version": (lambda: without("wherefrom_record"), "wherefrom_record is None"),
    "a field too few": (lambda: without("gray"), "lacks gray"),
    "a field too many": (lambda: changed(pixels=[1]), "has a field 'pixels', which no record has"),
    "another shape": (lambda: changed(boxes=[[[0, 0, 1]] * 2] * 3), "boxes: 3 where 4 are expected on axis 2"),
    "a ragged list": (lambda: changed(flipped=[[True, False], [True], [True, True]]), "flipped: 1 where 2 are expected on axis 1"),
    "no list": (lambda: changed(sample=3), "sample: int where a list is expected on axis 0"),
    "too many samples": (lambda: changed(sample=[0] * 10_000), "drawn_for: 3 where 10000 are expected"),
    "a number of another kind": (lambda: changed(sample=[0, 1.0, 2]), "sample: 1.0 is no int64"),
    "a number for yes": (lambda: changed(valid=[[1, 1]] * 3), "valid: 1 is no bool"),
    "yes for a number": (lambda: changed(brightness=[[True, 1]] * 3), "brightness: True is no float32"),
    "a word for a number": (lambda: changed(brightness=[["1", 1]] * 3), "brightness: '1' is no float32"),
    "too large for its type": (lambda: changed(source_size=[[2**31, 1]] * 3), "source_size: 2147483648 is no int32"),
    "too large for a float32": (lambda: changed(hue_rad=[[1e39, 0]] * 3), r"hue_rad: 1e\+39 is no float32"),
    "a whole number without end": (lambda: changed(hue_rad=[[10**3000, 0]] * 3), "hue_rad: 10+ is no float32"),
    "more digits than Python reads": (lambda: '{"seed": 1' + "0" * 10_000 + "}", "no JSON"),
    "infinity": (lambda: drawn()[0].to_json().replace('"seed": 5', '"seed": Infinity'), "no JSON: Infinity is no number of JSON"),
    "infinity in disguise": (lambda: drawn()[0].to_json().replace('"boxes": [[[', '"boxes": [[[1e999, '), "boxes: 5 where 4"),
    "a number beyond all": (
        lambda: changed(hue_rad=[[0, 0]] * 3).replace('"hue_rad": [[0', '"hue_rad": [[1e999'),
        "hue_rad: inf is no float32",
    ),
    "turns of another circle": (lambda: changed(quarter_turns=[[7, 0]] * 3), "quarter_turns: 7, needs 0 to 3"),
    "an orientation that EXIF lacks": (lambda: changed(stored_orientation=[1, 9, 3]), "stored_orientation: 9, needs 1 to 8"),
    "a picture without pixels": (lambda: changed(source_size=[[0, 9]] * 3), "source_size: 0, needs 1 to"),
    "a box without pixels": (lambda: changed(boxes=[[[5, 5, 5, 9]] * 2] * 3), "boxes: one is empty, needs x0 < x1"),
    "a size of words": (lambda: changed(size_px=["24", "40"]), "size_px=.*needs a tuple"),
    "a seed of half": (lambda: changed(seed=0.5), "seed=0.5: needs a whole number"),
    "a family of none": (lambda: changed(family=None), "family=None: needs a text"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_record_is_refused_in_one_line(case: str) -> None:
    text, message = HOSTILE[case]
    with pytest.raises(ValueError, match=f"^record as JSON: .*{message}") as refused:
        Record.from_json(text())
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
