"""The pixel proof: that the source point which a record names is the one that the pixel shows, for any renderer.

Here: every mirror, turn and EXIF orientation under every crop law, shrinking and enlarging; comparing what the pixels say with
`view_to_source`; mistakes made on purpose, which must fail.
Not here: the pictures and how they are read (coordinate_pictures.py), printing the outcome (wherefrom.tools.prove).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from wherefrom.pipeline import geometry as maps
from wherefrom.pipeline.proof.coordinate_pictures import SIGNALS, Format, coordinate_pictures, is_clear, read_coordinate, wave_level
from wherefrom.pipeline.proof.level_errors import levels
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.renderer import Renderer, render_checked
from wherefrom.pipeline.view_recipe import LAWS, CropLaw, PixelType, Snap, ViewFamily, ViewRecipe, check_law
from wherefrom.pipeline.views import Record, ViewGeometry

LEAST_READ = 0.05  # a row of which fewer points can be read proves nothing

FLOAT_WORST_PX = 0.1
ROUNDED_WORST_PX, ROUNDED_MEAN_PX = 0.16, 0.05

MISTAKES = ("half a pixel aside", "axes swapped", "turned the wrong way", "mirror forgotten")

WAYS = 8  # mirrored or not, times four turns: each law shows each way in each picture, in as many families as it takes


@dataclass(frozen=True, kw_only=True, slots=True)
class ProofCase:
    """One set of coordinate pictures in all eight EXIF orientations, cut by laws, mirrored and turned in every way."""

    size_px: tuple[int, int]  # (height, width) of the finished views
    source_size: tuple[int, int]  # (height, width), upright
    pixels: PixelType
    format: Format
    snap: Snap
    laws: tuple[str, ...] = ()  # by their names in LAWS; none named: all of them

    @property
    def recipe(self) -> ViewRecipe:
        """The laws, as families of one recipe."""
        families = tuple(
            ViewFamily(name=f"{shown}/{copy}", views=views, size_px=self.size_px, law=law, turns=True, snap=self.snap)
            for shown, law in _examples(self.laws)
            for views in [law.fixed_views or WAYS]
            for copy in range(math.ceil(WAYS / views))
        )
        return ViewRecipe(families=families, pixels=self.pixels)


def _examples(names: Sequence[str]) -> Iterator[tuple[str, CropLaw]]:
    """Yield the laws of the table with what to call them; those that refer to a family take the first one of the table's first law."""
    anchor = f"{next(iter(LAWS))}/0"
    for name in names or LAWS:
        for word, law in law_examples(name, anchor).items():
            yield f"{name}, {word}" if word else name, law


def law_examples(name: str, of: str) -> Mapping[str, CropLaw]:
    """Return the laws under a name of the table that the proof cuts by; `of` is a family to refer to.

    Raises: ValueError in one line if another package declares what makes no laws.
    """
    kind = LAWS[name]
    try:
        laws = kind.examples(of)
        for law in laws.values():
            check_law(law)
    except (TypeError, AttributeError, ValueError) as problem:
        if name in LAWS.own:
            raise
        raise ValueError(f"law {name!r} of {LAWS.owner(name)} makes no example to prove: {problem}; mend its `examples`") from problem
    return laws


def proof_cases(snaps: Sequence[Snap] = ("pixel", "none"), *, quick: bool = False) -> tuple[ProofCase, ...]:
    """Return the cases of the proof, all of them or a short cut through them; `snaps` names what the renderer can cut."""
    wide, tall = (333, 410), (397, 303)  # sides that are no multiple of the wave's period
    if quick:
        return (
            ProofCase(size_px=(56, 40), source_size=wide, pixels="float32", format="PNG", snap=snaps[0]),
            ProofCase(size_px=(64, 88), source_size=tall, pixels="uint8", format="JPEG", snap=snaps[-1]),
        )
    outputs: tuple[PixelType, ...] = ("float32", "uint8")
    formats: tuple[Format, ...] = ("PNG", "JPEG")
    return tuple(
        ProofCase(size_px=size, source_size=source, pixels=pixels, format=format, snap=snap)
        for snap in snaps
        for pixels in outputs
        for format in formats
        for size, source in (((72, 56), wide), ((96, 128), tall), ((208, 176), wide))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProofRow:
    """How far the pixels of one case and law lie from what their records say."""

    law: str
    case: ProofCase
    rounded: bool  # pixels are whole levels; the bars allow for it
    points: int  # read, per axis and channel
    read_frac: float  # of all view pixels
    mean_px: float  # source pixels
    worst_px: float

    @property
    def passed(self) -> bool:
        """Whether enough was read, and all of it lies within the bars."""
        return self.read_frac >= LEAST_READ and _within_bars(self.mean_px, self.worst_px, self.rounded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """A mistake made on purpose: the row in which it looks mildest must still fail."""

    mistake: str
    rows: int
    mildest_mean_px: float
    mildest_worst_px: float
    caught: bool  # in every row, of which there is at least one


@dataclass(frozen=True, kw_only=True, slots=True)
class ProofReport:
    """What the proof found for one renderer."""

    renderer: str
    rows: tuple[ProofRow, ...]
    controls: tuple[Control, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed and every mistake was caught."""
        return all(row.passed for row in self.rows) and all(control.caught for control in self.controls)


def prove(
    renderer_factory: Callable[[ViewRecipe], Renderer],
    *,
    cases: Sequence[ProofCase] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ProofReport:
    """Render coordinate pictures, read the source coordinates from the pixels alone, compare them with the records.

    `renderer_factory` builds a renderer for a recipe; `cases` default to `proof_cases()`; `progress(done, of)` is called after each case.
    Raises: ValueError if a coordinate picture does not decode.
    """
    cases = proof_cases() if cases is None else cases
    rows: list[ProofRow] = []
    mistaken: dict[str, list[ProofRow]] = {mistake: [] for mistake in MISTAKES}
    name = ""
    for done, case in enumerate(cases):
        renderer = renderer_factory(case.recipe)
        try:
            name = renderer.name
            errors = _case_errors(renderer, case)
        finally:
            renderer.close()
        rows += [sums.row(law, case) for (law, mistake), sums in errors.items() if mistake is None]
        for (law, mistake), sums in errors.items():
            if mistake is not None and sums.points:
                mistaken[mistake].append(sums.row(law, case))
        if progress is not None:
            progress(done + 1, len(cases))
    controls = tuple(
        Control(
            mistake=mistake,
            rows=len(each),
            mildest_mean_px=min((row.mean_px for row in each), default=math.nan),
            mildest_worst_px=min((row.worst_px for row in each), default=math.nan),
            caught=bool(each) and not any(_within_bars(row.mean_px, row.worst_px, row.rounded) for row in each),
        )
        for mistake, each in mistaken.items()
    )
    return ProofReport(renderer=name, rows=tuple(rows), controls=controls)


@dataclass(kw_only=True, slots=True)
class _Errors:
    """Running sums over the points of one law."""

    points: int = 0
    pixels: int = 0
    total_px: float = 0.0
    worst_px: float = 0.0
    rounded: bool = True

    def add(self, error: Tensor, read: Tensor, rounded: bool) -> None:
        readable = error[read]
        self.points += readable.numel()
        self.pixels += read.numel()
        self.rounded &= rounded
        if readable.numel():
            self.total_px += float(readable.sum(dtype=torch.float64))
            self.worst_px = max(self.worst_px, float(readable.max()))

    def row(self, law: str, case: ProofCase) -> ProofRow:
        mean = self.total_px / self.points if self.points else math.nan
        return ProofRow(
            law=law,
            case=case,
            rounded=self.rounded,
            points=self.points,
            read_frac=self.points / max(self.pixels, 1),
            mean_px=mean,
            worst_px=self.worst_px,
        )


def _within_bars(mean_px: float, worst_px: float, rounded: bool) -> bool:
    return mean_px <= ROUNDED_MEAN_PX and worst_px <= (ROUNDED_WORST_PX if rounded else FLOAT_WORST_PX)


def _case_errors(renderer: Renderer, case: ProofCase) -> dict[tuple[str, str | None], _Errors]:
    """Return the errors of one case, by law and by mistake (None: none was made)."""
    recipe = case.recipe
    errors: dict[tuple[str, str | None], _Errors] = {}
    for orientations in np.split(np.arange(1, 9), 4):
        files = [np.frombuffer(file, np.uint8) for o in orientations for file in coordinate_pictures(case.source_size, case.format, int(o))]
        law_records = draw_records(
            recipe,
            seed=0,
            epoch=0,
            drawn_for=np.repeat(orientations.astype(np.int64), SIGNALS),
            source_size=np.tile(np.array(case.source_size, np.int32), (len(files), 1)),
            stored_orientation=np.repeat(orientations.astype(np.uint8), SIGNALS),
        )
        records = [_in_every_way(one.geometry) for one in law_records]
        rendered = render_checked(renderer, recipe, files, [Record.of(record) for record in records])
        if rendered.failed:
            position, reason = next(iter(rendered.failed.items()))
            raise ValueError(f"coordinate picture {position} of {len(files)} ({case.format}): renderer {renderer.name!r} says {reason}")
        for record, pixels in zip(records, rendered.pixels, strict=True):
            law = record.family.partition("/")[0]
            shown = levels(pixels, recipe).float()
            rounded = pixels.dtype != torch.float32 or bool(((shown - shown.round()).abs() < 0.01).all())
            read, usable = _read(shown, record)
            for mistake, claim, concerned in _claims(record):
                channels = slice(None) if mistake is None else slice(1)  # one channel is enough to see a mistake
                error, kept = (read[:, :, channels] - claim).abs(), usable[:, :, channels] & concerned
                errors.setdefault((law, mistake), _Errors()).add(error, kept, rounded)
    return errors


def _in_every_way(record: ViewGeometry) -> ViewGeometry:
    """Give the views every mirror and turn in turn; the families of one law go on where the last one ended."""
    pictures, views = record.flipped.shape
    way = (torch.arange(views) + views * int(record.family.partition("/")[2])).expand(pictures, views)
    return replace(record, flipped=way % 2 == 1, quarter_turns=way // 2 % 4)


def _read(shown: Tensor, record: ViewGeometry) -> tuple[Tensor, Tensor]:
    """Read every pixel's source point, and which of them can be read: away from the box's border by two supports, and from the crests.

    Shapes: shown (S * 4, V, 3, h, w) -> both (S, V, 3, h * w, 2), (x, y).
    """
    ramp_x, wave_x, ramp_y, wave_y = shown.unflatten(0, (-1, SIGNALS)).flatten(-2).unbind(1)
    height, width = record.source_size[0].tolist()
    one = record[::SIGNALS]
    read, usable = [], []
    truth = _centers(one.view_to_source, one.size_px)
    for axis, (ramp, wave, side) in enumerate(((ramp_x, wave_x, width), (ramp_y, wave_y, height))):
        first, last = one.boxes[..., axis, None, None], one.boxes[..., axis + 2, None, None]
        across = torch.where(one.quarter_turns % 2 == axis, one.size_px[1], one.size_px[0])[..., None, None]  # view pixels along it
        reach = ((last - first) / across).clamp(min=1)  # half the base of the filter
        where = truth[..., axis]
        inside = (where >= first + 2 * reach) & (where <= last - 2 * reach)
        read.append(read_coordinate(ramp, wave, side))
        due = is_clear(wave_level(where), side, reach + 1)  # by the record: a view that shows nothing must not go unread
        usable.append((is_clear(wave, side, reach) | due) & inside)
    return torch.stack(read, -1), torch.stack(usable, -1)


def _claims(record: ViewGeometry) -> list[tuple[str | None, Tensor, Tensor]]:
    """Return what the record says, then what it would say with each mistake: (mistake, points, which views it concerns).

    Shapes: points (S, V, 1, h * w, 2), views (S, V, 1, 1, 1) bool.
    """
    one = record[::SIGNALS]
    flipped, turns = one.flipped, one.quarter_turns
    truth = _centers(one.view_to_source, one.size_px)
    all_views = torch.ones_like(flipped)
    backwards = _centers(maps.view_to_source(one.boxes, flipped, -turns, one.size_px), one.size_px)
    unmirrored = _centers(maps.view_to_source(one.boxes, torch.zeros_like(flipped), turns, one.size_px), one.size_px)
    mistakes = [(truth + 0.5, all_views), (truth.flip(-1), all_views), (backwards, turns % 2 == 1), (unmirrored, flipped)]
    claims = zip((None, *MISTAKES), [(truth, all_views), *mistakes], strict=True)
    return [(mistake, points, views[..., None, None, None]) for mistake, (points, views) in claims]


def _centers(view_to_source: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Return where the centers of all view pixels lie in the source: (S, V, 1, h * w, 2) float32."""
    y, x = torch.meshgrid(torch.arange(size_px[0]) + 0.5, torch.arange(size_px[1]) + 0.5, indexing="ij")
    return maps.map_points(view_to_source, torch.stack([x, y], -1).flatten(0, 1)).unsqueeze(2).float()  # 1e-4 px at most
