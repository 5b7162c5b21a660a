"""The pixel proof: both renderers pass it, and renderers that really err do not; reading coordinates against the pictures' own formulas."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.proof.coordinate_pictures import coordinate_pictures, is_clear, ramp_level, read_coordinate, wave_level
from wherefrom.pipeline.proof.prove import MISTAKES, ProofReport, proof_cases, prove
from wherefrom.pipeline.render.choose import make_renderer, renderer_entry
from wherefrom.pipeline.render.dali_decode import dali_missing
from wherefrom.pipeline.render.dali_renderer import DaliRenderer
from wherefrom.pipeline.render.renderer import Rendered, Renderer
from wherefrom.pipeline.view_recipe import Snap, ViewRecipe
from wherefrom.pipeline.views import Record, ViewGeometry
from wherefrom.tools import prove as command

dali_only = pytest.mark.skipif(dali_missing() is not None, reason="NVIDIA DALI is not installed")
native_only = pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))
RENDERERS = [
    pytest.param(partial(make_renderer, name="torch"), ("pixel",), {True}, id="torch"),
    pytest.param(partial(make_renderer, name="native"), ("pixel", "none"), {False, True}, id="native", marks=native_only),
    pytest.param(partial(make_renderer, name="dali"), ("pixel", "none"), {True}, id="dali", marks=dali_only),
    pytest.param(DaliRenderer, ("pixel", "none"), {False, True}, id="dali exact", marks=dali_only),
]
SQUARE = replace(proof_cases(("pixel",), quick=True)[0], source_size=(333, 333))  # forgotten turns still decode to its size
TINY = replace(SQUARE, size_px=(4, 4))
Factory = Callable[[ViewRecipe], Renderer]


def assert_proven(report: ProofReport) -> None:
    assert [row for row in report.rows if not row.passed] == []
    assert [control for control in report.controls if not control.caught] == []
    assert tuple(control.mistake for control in report.controls) == MISTAKES
    assert report.passed


@pytest.mark.parametrize(("factory", "snaps", "rounded"), RENDERERS)
def test_pixels_prove_the_record_in_a_cut_through_the_cases(factory: Factory, snaps: tuple[Snap, ...], rounded: set[bool]) -> None:
    report = prove(factory, cases=proof_cases(snaps, quick=True))
    assert_proven(report)
    assert {row.rounded for row in report.rows} == rounded


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "snaps", "rounded"), RENDERERS)
def test_pixels_prove_the_record_for_every_way_law_size_format_and_output(
    factory: Factory, snaps: tuple[Snap, ...], rounded: set[bool]
) -> None:
    report = prove(factory, cases=proof_cases(snaps))
    assert_proven(report)
    assert {row.rounded for row in report.rows} == rounded


class Erring:
    """The torch renderer with a fault before or after it."""

    name = "erring"
    strict = True

    def __init__(
        self, recipe: ViewRecipe, before: Callable[[ViewGeometry], ViewGeometry], after: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.inner, self.before, self.after = make_renderer(recipe, "torch"), before, after

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[Record]) -> Rendered:
        rendered = self.inner.render(encoded, [replace(record, geometry=self.before(record.geometry)) for record in records])
        return replace(rendered, pixels=tuple(self.after(pixels) for pixels in rendered.pixels))

    def close(self) -> None:
        self.inner.close()


def same(value: object) -> object:
    return value


def moved(geometry: ViewGeometry) -> ViewGeometry:
    boxes = geometry.boxes.clone()
    room = boxes[..., 2] < geometry.source_size[:, 1:]
    boxes[..., 0::2] += torch.where(room, 1.0, -1.0)[..., None]
    return replace(geometry, boxes=boxes.clamp(min=0))


def one_view_blank(pixels: torch.Tensor) -> torch.Tensor:
    pixels[:, 0] = 0
    return pixels


@pytest.mark.core
def test_the_erring_renderer_without_a_fault_is_proven() -> None:
    assert_proven(prove(lambda recipe: Erring(recipe, same, same), cases=[SQUARE]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(moved, same, id="boxes a pixel aside"),
        pytest.param(lambda g: replace(g, quarter_turns=-g.quarter_turns % 4), same, id="turned the wrong way"),
        pytest.param(lambda g: replace(g, flipped=torch.zeros_like(g.flipped)), same, id="mirror forgotten"),
        pytest.param(
            lambda g: replace(g, stored_orientation=torch.ones_like(g.stored_orientation)), same, id="EXIF turn of half forgotten"
        ),
        pytest.param(same, lambda pixels: pixels.roll(1, -1), id="a view pixel aside"),
        pytest.param(same, one_view_blank, id="one view blank"),
        pytest.param(same, lambda pixels: pixels * torch.nan if pixels.is_floating_point() else pixels * 0, id="no picture at all"),
    ],
)
def test_a_renderer_that_errs_is_found_out(
    before: Callable[[ViewGeometry], ViewGeometry], after: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    report = prove(lambda recipe: Erring(recipe, before, after), cases=[SQUARE])
    assert not report.passed
    assert not any(row.passed for row in report.rows)


@pytest.mark.core
def test_a_picture_that_will_not_decode_is_named() -> None:
    class Refusing(Erring):
        def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[Record]) -> Rendered:
            return replace(super().render(encoded, records), failed={3: "out of ink"})

    with pytest.raises(ValueError, match=r"coordinate picture 3 of 8 \(PNG\): renderer 'erring' says out of ink"):
        prove(lambda recipe: Refusing(recipe, same, same), cases=[TINY])  # type: ignore[arg-type]


@pytest.mark.core
def test_progress_counts_the_cases() -> None:
    told: list[tuple[int, int]] = []
    prove(lambda recipe: make_renderer(recipe, "torch"), cases=[TINY, TINY], progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.core
@given(side=st.integers(57, 1500), at=st.floats(0, 1), ramp_error=st.floats(-1.9, 1.9), wave_error=st.floats(-0.5, 0.5))
def test_coordinates_are_read_back_from_levels_alone(side: int, at: float, ramp_error: float, wave_error: float) -> None:
    x = torch.tensor(at * side, dtype=torch.float64)
    ramp, wave = ramp_level(x, side) + ramp_error, wave_level(x) + wave_error
    if is_clear(wave, side, torch.tensor(1.0)):
        assert abs(float(read_coordinate(ramp, wave, side) - x)) <= 0.5 / 8 + 1e-9


@pytest.mark.parametrize("orientation", range(1, 9))
def test_coordinate_pictures_are_upright_once_pillow_undoes_their_orientation(orientation: int) -> None:
    for file, upright in zip(coordinate_pictures((61, 73), "PNG", orientation), coordinate_pictures((61, 73), "PNG"), strict=True):
        turned = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
        np.testing.assert_array_equal(np.asarray(turned), np.asarray(Image.open(io.BytesIO(upright))))
        assert turned.size == (73, 61)


def test_the_full_proof_holds_every_combination_that_it_promises() -> None:
    cases = proof_cases()
    assert {(case.pixels, case.format, case.snap) for case in cases} == {
        (pixels, format, snap) for pixels in ("float32", "uint8") for format in ("PNG", "JPEG") for snap in ("pixel", "none")
    }
    assert all(side % 56 for case in cases for side in case.source_size)  # no multiple of the wave's period
    for case in cases:
        views: dict[str, int] = {}
        for family in case.recipe.families:
            law = family.name.partition("/")[0]
            views[law] = views.get(law, 0) + family.views
        assert set(views.values()) == {8}


@pytest.mark.parametrize(("fault", "code", "said"), [(same, 0, "proven"), (lambda pixels: pixels.roll(1, -1), 1, "NOT proven")])
def test_the_command_says_what_holds_and_exits_with_one_if_anything_is_red(
    fault: Callable[[torch.Tensor], torch.Tensor],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "proof_cases", lambda snaps, quick: (SQUARE,))
    monkeypatch.setattr(command, "make_renderer", lambda recipe, name, device: Erring(recipe, same, fault))  # type: ignore[arg-type]
    assert command.prove_command("torch") == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(said)
    rows = [line for line in lines if "56 x 40" in line]
    assert [line.split("  ")[0] for line in rows] == [
        *("independent", "paired", "disjoint", "overlapping", "inside", "center, whole", "center, cropped", "grid", "scattered", "tiles")
    ]
    assert all(line.endswith("RED" if code else "holds") for line in rows)
    assert sum(line.endswith("fails as it must") for line in lines) == len(MISTAKES)


@pytest.mark.core
def test_the_command_says_who_serves_and_why_who_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    proven: list[str] = []

    def make(recipe: ViewRecipe, name: str, device: str) -> Erring:
        proven.append(name)
        return Erring(recipe, same, same)

    monkeypatch.setattr(command, "proof_cases", lambda snaps, quick: (TINY,))
    monkeypatch.setattr(
        command, "prove", lambda factory, cases, progress: ProofReport(renderer=factory(TINY.recipe).name, rows=(), controls=())
    )
    monkeypatch.setattr(command, "make_renderer", make)
    reasons = {"native": "it was not built", "dali": "NVIDIA DALI is not installed"}
    monkeypatch.setattr(command, "renderer_entry", lambda name: replace(renderer_entry(name), missing=lambda: reasons.get(name)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.prove_command() == 0
    said = capsys.readouterr().out
    assert 'renderer="auto" takes ' in said and proven == ["torch"]
    for name, why in (*reasons.items(), ("triton", "it renders on cuda, which is not here or not asked for")):
        assert f"left out: renderer {name!r}: {why}" in said
        with pytest.raises(ValueError, match=f"^renderer '{name}': {why}$"):
            command.prove_command(name)
    with pytest.raises(ValueError, match=r"^renderer='natvie': take one of all, native, torch, triton, dali; did you mean 'native'\?$"):
        command.prove_command("natvie")


def test_a_device_that_is_not_here_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda': torch sees no CUDA GPU here; use --device cpu"):
        command.prove_command(device="cuda")


def test_a_case_may_name_the_laws_it_cuts_by() -> None:
    [every, some] = ([family.law for family in replace(SQUARE, laws=laws).recipe.families] for laws in ((), ("paired", "grid")))
    assert {type(law).__name__ for law in some} == {"Paired", "Grid"} < {type(law).__name__ for law in every}
    assert sum(family.views for family in replace(SQUARE, laws=("paired",)).recipe.families) == 8  # still in every way
