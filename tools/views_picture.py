"""The picture that makes a doubter believe: sources with their boxes, every view beside, landmarks that show the same spot in both.

Here: `wherefrom views`, and the same picture of a loader's next pictures, which a training run leaves in its folder, or of any batch.
Not here: anything about where views, and regions of views, come from; all of it is read from the records. What a method makes of
views, its objective shows (Objective.shown).
Every landmark is placed in the source and carried into the views by the record alone; what lies under it is for the eye to compare.
"""

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.pipeline import geometry
from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.demo.shards import demo_shards
from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.loader import Loader, make_loader
from wherefrom.pipeline.proof.level_errors import levels
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.shards.store import printable
from wherefrom.pipeline.view_recipe import ViewRecipe, law_name
from wherefrom.pipeline.views import Batch, Photometric, Views
from wherefrom.train.objective import QUARTER_TURNS, Objective, Panel, united_families
from wherefrom.train.objectives.pairs import learns_pairs
from wherefrom.train.recipes import started
from wherefrom.train.settings import settled

__all__ = ["save_batch_picture", "save_views_picture", "views_command"]

DPI = 110
SOURCE_IN = (4.4, 3.3)  # inches, (width, height), of the space for a source
REGIONS_IN = 3.3  # the longer side of a view whose regions are shown, where there are one or two
MANY_VIEWS_IN = 1.7  # the longer side of a view
TWO_VIEWS_IN = 2.6
LINE_IN = 0.125  # of a caption
LETTERS_PER_IN = 22.5  # in a caption
SHEET_OF = 30  # views of a family; more are shown side by side on a sheet, and numbered
SHEET_IN = 4.4  # the side of a sheet
PANEL_IN = 4.2  # the height of a panel's pictures with their labels, at most
PANEL_LEAST_IN = 2.6  # its width, at least: room for its captions
LABEL_IN = 0.2  # of a picture of a panel
PANEL_GAP_IN = 0.06
CROWDED = 6  # views of a picture; where there are more, a view shows its own landmarks only
GAP_IN = 0.16
TITLE_IN = 0.24
LEGEND = (
    "Each box's circle, triangle and square are placed in the source and carried into the views by the record: the same spot in both. "
    "White arrows: where the source's x and y point."
)
PAIRS_LEGEND = (
    " Lines between boxes: from the reference (dashed) to the target, p in sides of the "
    "reference as it is seen, ln s how much larger the target is."
)
COMMON_LEGEND = " Numbered boxes on a view: what it shares with the view of that number, in a box there of its own number."
REGIONS_LEGEND = " Thin numbered boxes: regions of the view, drawn in its pixels, and where the record says that they lie in the source."
SHEET_LEGEND = " A sheet shows many small views in their order; their boxes in the source have the same numbers."
LANDMARKS = (("o", 0.25, 0.25), ("^", 0.75, 0.3), ("s", 0.35, 0.75))  # shape, and where in the upright box: no mirror or turn keeps them
OUTLINE: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=2.6, foreground="black", alpha=0.65)]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _ViewDrawing:
    """One view of one picture, ready to be drawn."""

    number: int  # over all families
    color: tuple[float, ...]
    pixels: NDArray[np.uint8]  # (h, w, 3)
    box: Tensor  # (4,) float64, source pixels
    to_view: Tensor  # (2, 3)
    captions: tuple[str, ...]  # lines
    reference: int | None = None  # the number of its family's first view, if pairs with it are learned
    target: tuple[float, float, float] | None = None  # p (x, y) and ln s as the reference shows them
    common: Mapping[int, Tensor] = field(default_factory=dict)  # by number of a view: what both share, (4,), pixels of this one
    regions: Tensor | None = None  # (R, 4), pixels of the view
    regions_in_source: Tensor | None = None  # (R, 4)
    is_sheet: bool = False  # many views side by side, each one of the regions

    @property
    def landmarks(self) -> Tensor:
        """(3, 2) float64, source pixels."""
        within = torch.tensor([[across, down] for _, across, down in LANDMARKS], dtype=torch.float64)
        return self.box[:2] + within * (self.box[2:] - self.box[:2])


def views_command(
    recipe: tyro.conf.Positional[str] = "",
    data: str | None = None,
    config: Path | None = None,
    out: Path = Path("views.png"),
    samples: int = 6,
    seed: int | None = None,
    epoch: int = 0,
) -> int:
    """Draw sources with their crop boxes, beside them every view that is cut from them, and what its method makes of these.

    A dense recipe's regions, what GTSA's views share, tiles as jigsaw lays them out, and whatever else an objective shows.

    Args:
        recipe: whose views, one that `wherefrom recipes` lists; default: the file's, or demo.
        data: shards, as for `wherefrom train`; default: the file's, or the demo's pictures, rendered once.
        config: a settings.yaml, whole or in part, as for `wherefrom train`.
        out: the PNG.
        samples: how many pictures, the first ones of the epoch's order.
        seed: of the draws and the order; default: the file's, or 0.
        epoch: whose draws.
    Raises: OSError or ValueError of one line for shards or values that do not fit.
    """
    if samples < 1 or epoch < 0:
        raise ValueError(f"samples={samples}, epoch={epoch}: needs samples >= 1 and epoch >= 0")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.absolute().parent}; make it, or take another --out")
    settings = settled(started(recipe, config), source=config)
    objectives, seed = settings.make_objectives(), settings.seed if seed is None else seed
    families = ViewRecipe(families=united_families(objectives))
    shards = data or settings.data or demo_shards().train
    with make_loader(shards, families, seed=seed, global_batch=1, order=settings.order, threads=0) as loader:
        loader.seek(epoch * loader.updates_per_epoch)
        save_views_picture(out, loader, samples, objectives=objectives)
    print(f"{out}: {min(samples, len(loader.index))} pictures of recipe {settings.recipe}, seed {seed}, epoch {epoch}")
    return 0


def save_views_picture(path: Path, loader: Loader, samples: int = 6, *, objectives: Sequence[Objective] = ()) -> None:
    """Draw the first pictures of a loader's epoch with all their views into a PNG at `path`, whole or not at all.

    The objectives say what is learned of the views: pairs with a reference, regions of a view, or what their panels show.
    """
    order, epoch = loader.order, loader.updates // loader.updates_per_epoch
    ids = order.ids(epoch, np.arange(min(samples, order.samples)))
    save_batch_picture(path, loader, loader.batch(ids, epoch=epoch), objectives=objectives)


def save_batch_picture(path: Path, loader: Loader, batch: Batch, *, objectives: Sequence[Objective] = (), title: str = "") -> None:
    """Draw a loader's batch with all its views into a PNG at `path`, whole or not at all; `title` heads the picture."""
    batch = batch.to("cpu")
    with ShardReader(loader.index) as reader:
        sources = [decode_picture(reader.read(i), int(loader.index.orientation[i])) for i in batch.sample.tolist()]
    rows = [list(_view_drawings(batch[b].views, loader.recipe, objectives)) for b in range(len(batch))]
    panels = [[panel for objective in objectives for panel in objective.shown(batch[b])] for b in range(len(batch))]

    layout = _Layout.of(rows, panels)
    legend = textwrap.wrap(_legend(rows[0]), int(layout.width * LETTERS_PER_IN * 0.8))
    headings = [*filter(None, [title]), _families_words(loader, batch)]
    head = 0.22 + 0.2 * len(headings) + 0.14 * len(legend)
    figure = Figure(figsize=(layout.width, head + len(rows) * layout.row))
    _write(figure, GAP_IN, 0.1, headings, size=10, weight="bold")
    _write(figure, GAP_IN, 0.13 + 0.2 * len(headings), legend, size=7, color="0.25")
    for b, (source, drawings) in enumerate(zip(sources, rows, strict=True)):
        top = head + b * layout.row
        _write(figure, GAP_IN, top, [_title(loader, batch[b])], size=8)
        _draw_source(_axes(figure, GAP_IN, top + TITLE_IN, *SOURCE_IN), source, drawings)
        _draw_views(figure, layout, top + TITLE_IN, drawings)
        for panel, left in zip(panels[b], layout.panels, strict=True):
            _draw_panel(figure, left, top + TITLE_IN, panel, loader.recipe)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=DPI)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where views stand beside their source, in inches."""

    columns: int  # of views
    side: float  # of a view, the longer one
    caption: float  # the height of the longest caption
    row: float  # the height of a picture's row
    panels: tuple[float, ...]  # the left edge of each
    width: float  # of the whole figure

    @staticmethod
    def of(rows: Sequence[Sequence[_ViewDrawing]], panels: Sequence[Sequence[Panel]]) -> "_Layout":
        """Return the layout of pictures that all have as many views, and panels of the same shapes."""
        views = len(rows[0])
        regions = any(view.regions is not None for view in rows[0])
        if any(view.is_sheet for view in rows[0]):
            columns, side = views, SHEET_IN
        elif views <= 2:
            columns, side = views, REGIONS_IN if regions else TWO_VIEWS_IN
        else:
            columns, side = (math.ceil(views / 2) if views <= 16 else 8), MANY_VIEWS_IN
        caption = 0.1 + LINE_IN * max(len(_wrap(view.captions, side)) for row in rows for view in row)
        heights = [_panel_size(panel)[1] for each in panels for panel in each]
        row = TITLE_IN + max(SOURCE_IN[1], math.ceil(views / columns) * (side + caption), *heights) + GAP_IN
        ends = [SOURCE_IN[0] + columns * (side + GAP_IN) + 3 * GAP_IN]
        for panel in panels[0]:
            ends.append(ends[-1] + _panel_size(panel)[0] + 2 * GAP_IN)
        lefts = tuple(end + GAP_IN for end in ends[:-1])
        return _Layout(columns=columns, side=side, caption=caption, row=row, panels=lefts, width=ends[-1])


def _panel_size(panel: Panel) -> tuple[float, float]:
    """Return width and height, in inches, of a panel with its words."""
    side, columns = _panel_side(panel), panel.pictures.shape[1]
    width = max(columns * (side + PANEL_GAP_IN), PANEL_LEAST_IN)
    rows = panel.pictures.shape[0] * (side + LABEL_IN)
    return width, rows + LINE_IN * (len(_wrap([panel.title], width)) + len(_wrap(panel.captions, width))) + GAP_IN


def _panel_side(panel: Panel) -> float:
    """Return the longer side of a panel's pictures, in inches."""
    return min(MANY_VIEWS_IN, PANEL_IN / panel.pictures.shape[0] - LABEL_IN)


def _legend(drawings: Sequence[_ViewDrawing]) -> str:
    """Return the words that say what is drawn, of what there is."""
    return "".join(
        [
            LEGEND * any(not view.is_sheet for view in drawings),
            PAIRS_LEGEND * any(view.reference is not None for view in drawings),
            REGIONS_LEGEND * any(view.regions is not None and not view.is_sheet for view in drawings),
            SHEET_LEGEND * any(view.is_sheet for view in drawings),
            COMMON_LEGEND * any(view.common for view in drawings),
        ]
    ).strip()


def _view_drawings(families: Sequence[Views], recipe: ViewRecipe, objectives: Sequence[Objective]) -> Iterator[_ViewDrawing]:
    """Yield every view of one picture (B = 1), numbered over all families."""
    named = [(objective.families[0].name, objective) for objective in objectives]
    on_pairs = {name: objective for name, objective in named if learns_pairs(objective)}
    numbers = _numbers(families)
    shared = _shared(families, recipe, numbers)
    for views, own_numbers in zip(families, numbers, strict=True):
        record, first, count = views.geometry, own_numbers[0], len(views.geometry.view)
        if count > SHEET_OF:
            yield _sheet(views, recipe, first)
            continue
        objective = on_pairs.get(record.family)
        regions = objective.boxes(record)[0] if objective is not None and count == 1 else None
        has_reference = objective is not None and count > 1
        targets = pair_targets(record.boxes[0], flipped=record.flipped[0], quarter_turns=record.quarter_turns[0])[0].tolist()
        for v, (number, (across, down, log_scale)) in enumerate(zip(own_numbers, targets, strict=True)):
            target_words = f"p ({across:+.2f}, {down:+.2f})   ln s {log_scale:+.2f}" if v else "reference"
            orientation = _orientation(bool(record.flipped[0, v]), int(record.quarter_turns[0, v]))
            if not views.valid[0, v]:
                orientation += "; picture too small for the law"
            common = shared.get(number, {})
            yield _ViewDrawing(
                number=number,
                color=colormaps["tab10" if number < 10 else "tab20"](number % 20),
                pixels=_drawable(views.pixels[0, v], recipe),
                box=record.boxes[0, v].double(),
                to_view=record.source_to_view[0, v],
                captions=(
                    f"{number} {record.family}" + (f" [{v}]" if count > 1 else ""),
                    target_words if has_reference else "",
                    f"{len(regions)} regions" if regions is not None else "",
                    orientation,
                    ", ".join(words for _, words in common.values() if words),
                    _color_words(views.photometric[0, v]),
                ),
                reference=first if has_reference else None,
                target=(across, down, log_scale) if has_reference else None,
                common={other: box for other, (box, _) in common.items()},
                regions=regions,
                regions_in_source=None if regions is None else geometry.map_boxes(record.view_to_source[0, v], regions.double()),
            )


def _numbers(families: Sequence[Views]) -> list[range]:
    """Return the numbers of every family's views: a single one if it is drawn as a sheet."""
    counts = [1 if len(views.geometry.view) > SHEET_OF else len(views.geometry.view) for views in families]
    return [range(end - count, end) for count, end in zip(counts, itertools.accumulate(counts), strict=True)]


def _shared(families: Sequence[Views], recipe: ViewRecipe, numbers: Sequence[range]) -> dict[int, dict[int, tuple[Tensor, str]]]:
    """Return what every two views share of which one's law refers to the other's family.

    By their numbers: the common box (4,) in the pixels of the first and, if that law is its own, how it lies beside the second, in words.
    """
    shared: dict[int, dict[int, tuple[Tensor, str]]] = {}
    by_name = {views.geometry.family: (views, own) for views, own in zip(families, numbers, strict=True)}
    for family in recipe.families:
        if family.law.refers_to is None:
            continue
        (views, own_numbers), (others, other_numbers) = by_name[family.name], by_name[family.law.refers_to]
        if max(len(views.geometry.view), len(others.geometry.view)) > SHEET_OF:
            continue
        common = others.geometry.common(views.geometry)
        counted = (common.area > 0) & others.valid[:, :, None] & views.valid[:, None]
        for (a, other), (b, own) in itertools.product(enumerate(other_numbers), enumerate(own_numbers)):
            if other != own and counted[0, a, b]:
                turn = _orientation(bool(common.flipped[0, a, b]), int(common.quarter_turns[0, a, b]), upright="not turned")
                shared.setdefault(own, {})[other] = (common.other_boxes[0, a, b], f"beside {other} {turn}")
                shared.setdefault(other, {}).setdefault(own, (common.boxes[0, a, b], ""))
    return shared


def _drawable(pixels: Tensor, recipe: ViewRecipe) -> NDArray[np.uint8]:
    """Return a recipe's pixels (3, h, w) as (h, w, 3)."""
    return levels(pixels, recipe).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _sheet(views: Views, recipe: ViewRecipe, number: int) -> _ViewDrawing:
    """Return the many views of one family and picture (B = 1) as one, row by row, with a line of white between them."""
    record = views.geometry
    count, (height, width) = len(record.view), record.size_px
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    corners = torch.tensor([(v % columns * (width + 1), v // columns * (height + 1)) for v in range(count)], dtype=torch.float64)
    for v, (x, y) in enumerate(corners.int().tolist()):
        pixels[y : y + height, x : x + width] = _drawable(views.pixels[0, v], recipe)
    boxes = record.boxes[0].double()
    orientations = {_orientation(bool(record.flipped[0, v]), int(record.quarter_turns[0, v])) for v in range(count)}
    oriented = orientations.pop() if len(orientations) == 1 else "mirrored and turned by themselves"
    small = "" if views.valid.all() else "; picture too small for the law"
    return _ViewDrawing(
        number=number,
        color=colormaps["tab10"](number % 10),
        pixels=pixels,
        box=torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)]),
        to_view=record.source_to_view[0, 0],
        captions=(
            f"{number} {record.family}",
            f"{count} views of {width} x {height} px",
            oriented + small,
            _color_words(views.photometric[0, 0]),
        ),
        regions=torch.cat([corners, corners + torch.tensor([width, height])], -1),
        regions_in_source=boxes,
        is_sheet=True,
    )


def _orientation(flipped: bool, quarter_turns: int, *, upright: str = "as in the source") -> str:
    turned = f"turned {QUARTER_TURNS[quarter_turns]}" if quarter_turns else ""
    return ", ".join(filter(None, ["mirrored" if flipped else "", turned])) or upright


def _color_words(photometric: Photometric) -> str:
    """Say what changed the color of one view (1, 1), shortly; nothing if nothing did."""
    factors = (("light", photometric.brightness), ("contrast", photometric.contrast), ("saturation", photometric.saturation))
    words = [f"{name} {float(factor):.2f}" for name, factor in factors if float(factor) != 1]
    hue, blur = math.degrees(float(photometric.hue_rad)), float(photometric.blur_sigma_px)
    words += [f"hue {hue:+.0f}°"] * (hue != 0) + ["gray"] * bool(photometric.gray)
    words += [f"blur\u00a0{blur:.1f}\u00a0px"] * (blur > 0) + ["solarized"] * bool(photometric.solarized)
    return ", ".join(words)


def _title(loader: Loader, one: Batch) -> str:
    """Say which picture a row shows."""
    sample, drawn_for = int(one.sample), int(one.drawn_for)
    height, width = one.source_size[0].tolist()
    orientation = int(one.views[0].geometry.stored_orientation)
    words = f"sample {sample} ({printable(loader.index.key(sample))}), {width} x {height} pixels"
    words += f", stored with EXIF orientation {orientation}" if orientation != 1 else ""
    return words + (f", in place of sample {drawn_for}, with its draws" if drawn_for != sample else "")


def _families_words(loader: Loader, batch: Batch) -> str:
    return f"seed {loader.order.seed}, epoch {batch.views[0].geometry.epoch}   " + "   ".join(
        f"{family.name}: {family.views} x {family.size_px[0]} x {family.size_px[1]}, {law_name(family.law)}"
        for family in loader.recipe.families
    )


def _wrap(captions: Sequence[str], width_in: float) -> list[str]:
    """Return the lines that captions take beneath a view."""
    return [line for caption in captions for line in textwrap.wrap(caption, int(width_in * LETTERS_PER_IN))]


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes at a place in inches from the figure's top left corner; pictures keep their shape and stand at the top left."""
    across, down = figure.get_size_inches()
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.set_anchor("NW")
    axes.set_axis_off()
    return axes


def _write(figure: Figure, left: float, top: float, lines: Sequence[str], **style: Any) -> None:
    across, down = figure.get_size_inches()
    figure.text(left / across, 1 - top / down, "\n".join(lines), va="top", linespacing=1.3, parse_math=False, **style)


def _show(axes: Axes, picture: NDArray[np.uint8], interpolation: str) -> None:
    """Show (h, w, 3) so that pixel i covers [i, i + 1)."""
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0), interpolation=interpolation)
    axes.autoscale(False)


def _draw_source(axes: Axes, source: NDArray[np.uint8], drawings: Sequence[_ViewDrawing]) -> None:
    _show(axes, source, "antialiased")
    for view in drawings:
        x0, y0, x1, y1 = view.box.tolist()
        _draw_box(axes, (x0, y0, x1, y1), view.color, dashed=view.reference == view.number)
        _draw_number(axes, view.box, view)
        if view.regions_in_source is not None:
            _draw_regions(axes, view.regions_in_source)
        if not view.is_sheet:
            _draw_landmarks(axes, view.landmarks, view.color, size=4)
        if view.reference is not None and view.number != view.reference and len(drawings) <= CROWDED:
            reference = drawings[view.reference].box
            _draw_arrow(axes, (reference[:2] + reference[2:]) / 2, (view.box[:2] + view.box[2:]) / 2, view.color)


def _draw_views(figure: Figure, layout: _Layout, top: float, drawings: Sequence[_ViewDrawing]) -> None:
    """Draw all views of a picture, each with its caption below."""
    for n, view in enumerate(drawings):
        left = SOURCE_IN[0] + 3 * GAP_IN + n % layout.columns * (layout.side + GAP_IN)
        down = top + n // layout.columns * (layout.side + layout.caption)
        _draw_view(_axes(figure, left, down, layout.side, layout.side), view, drawings)
        below = down + layout.side * min(1, view.pixels.shape[0] / view.pixels.shape[1]) + 0.04
        lines = _wrap(view.captions, layout.side)
        _write(figure, left, below, lines[:1], size=6.5, color=view.color, weight="bold")
        _write(figure, left, below + LINE_IN, lines[1:], size=6.5, color="0.25")


def _draw_view(axes: Axes, view: _ViewDrawing, drawings: Sequence[_ViewDrawing]) -> None:
    """Draw a view, and on it what the record says lies there: landmarks, the other boxes, the source's axes, the way to targets."""
    _show(axes, view.pixels, "nearest")
    height, width = view.pixels.shape[:2]
    if view.regions is not None:
        _draw_regions(axes, view.regions)
    if view.is_sheet:
        return
    for other in drawings if len(drawings) <= CROWDED else [view]:
        if other is not view and not view.common:
            corners = geometry.map_boxes(view.to_view, other.box[None])[0].tolist()
            _draw_box(axes, corners, other.color, dashed=other.reference == other.number)
        if other is view or not view.common or other.number in view.common:
            _draw_landmarks(axes, geometry.map_points(view.to_view, other.landmarks), other.color, size=6 if other is view else 4)
        if other.target is not None and other.reference == view.number and other is not view:
            end = (width * (0.5 + other.target[0]), height * (0.5 + other.target[1]))
            axes.plot([width / 2, end[0]], [height / 2, end[1]], color=other.color, linewidth=1.2, path_effects=OUTLINE)
    _draw_box(axes, (0, 0, width, height), view.color, dashed=view.reference == view.number, line=2.5)
    for number, box in view.common.items():
        _draw_box(axes, box.tolist(), drawings[number].color, dashed=False)
        _draw_number(axes, box, drawings[number])
    _draw_compass(axes, view)


def _draw_panel(figure: Figure, left: float, top: float, panel: Panel, recipe: ViewRecipe) -> None:
    """Draw a panel's pictures, each with its label below, between its title and its captions."""
    width, _ = _panel_size(panel)
    title = _wrap([panel.title], width)
    _write(figure, left, top, title, size=6.5, color="0.1", weight="bold")
    top += 0.04 + LINE_IN * len(title)
    side, (rows, columns, _, height_px, width_px) = _panel_side(panel), panel.pictures.shape
    for n, label in enumerate(panel.labels):
        row, column = divmod(n, columns)
        x, y = left + column * (side + PANEL_GAP_IN), top + row * (side + LABEL_IN)
        _show(_axes(figure, x, y, side, side), _drawable(panel.pictures[row, column], recipe), "nearest")
        _write(figure, x, y + side * min(1, height_px / width_px) + 0.02, [label], size=6.5, color="0.25")
    _write(figure, left, top + rows * (side + LABEL_IN), _wrap(panel.captions, width), size=6.5, color="0.25")


def _draw_compass(axes: Axes, view: _ViewDrawing) -> None:
    """Draw where the source's axes point in a view."""
    height, width = view.pixels.shape[:2]
    length = 0.1 * min(height, width)
    origin = torch.tensor([1.7 * length, height - 1.7 * length], dtype=torch.float64)
    for axis, name in enumerate("xy"):
        along = view.to_view[:, axis] / view.to_view[:, axis].norm() * length
        _draw_arrow(axes, origin, origin + along, "white", head=6)
        x, y = (origin + along * 1.35).tolist()
        axes.text(x, y, name, size=6.5, color="white", ha="center", va="center", path_effects=OUTLINE)


def _draw_arrow(axes: Axes, start: Tensor, end: Tensor, color: tuple[float, ...] | str, *, head: float = 9) -> None:
    (x0, y0), (x1, y1) = start.tolist(), end.tolist()
    arrow = FancyArrowPatch((x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=head, color=color, linewidth=1.2, shrinkA=0, shrinkB=0)
    arrow.set_path_effects(OUTLINE)
    axes.add_patch(arrow)


def _draw_box(axes: Axes, box: Sequence[float], color: tuple[float, ...], *, dashed: bool, line: float = 1.4) -> None:
    x0, y0, x1, y1 = box
    style = "--" if dashed else "-"
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="black", alpha=0.5, linewidth=line + 1))
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=line, linestyle=style))


def _draw_number(axes: Axes, box: Tensor, view: _ViewDrawing) -> None:
    """Draw a view's number into the top left corner of a box."""
    label = {"facecolor": view.color, "edgecolor": "none", "pad": 1.2}
    axes.text(float(box[0]), float(box[1]), f"{view.number}", color="white", size=7, weight="bold", va="top", bbox=label)


def _draw_regions(axes: Axes, boxes: Tensor) -> None:
    """Draw numbered regions (R, 4), each of a color of its own as far as there are any."""
    for number, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        color = colormaps["tab20"](number % 20)
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1))
        axes.text(x0, y0, f"{number}", color=color, size=6, weight="bold", ha="left", va="top", path_effects=OUTLINE)


def _draw_landmarks(axes: Axes, points: Tensor, color: tuple[float, ...], size: float) -> None:
    for (shape, _, _), (x, y) in zip(LANDMARKS, points.tolist(), strict=True):
        for edge, width in (("black", 2.4), (color, 1.2)):
            axes.plot([x], [y], shape, markersize=size, markerfacecolor="none", markeredgecolor=edge, markeredgewidth=width)
