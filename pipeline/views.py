"""What the loader hands over: views, the record of where each came from, and the numbers that changed its color.

Here: containers that check their tensors once, on construction, and slice and move them together.
Not here: how any of it is drawn (records.py) or rendered (render/).
Indexing `views[b, v]` takes slices, lists, tensors or numbers for samples and views; a number keeps its axis, so axes never vanish.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from wherefrom.pipeline import geometry
from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.plain_tensors import from_json_line, to_json_line, to_tensor

Index = int | slice | Sequence[int] | Tensor

_EVERY = slice(None)


def _kept(index: Index, length: int, what: str) -> slice | Tensor:
    """Return an index that keeps its axis, of `length` samples or views."""
    if isinstance(index, slice):
        return index
    listed = _listed(index, what)
    if listed.ndim:
        if listed.dtype == torch.bool and len(listed) != length:
            raise IndexError(f"mask of {len(listed)} for {length} {what}s; give one value for each")
        if listed.dtype != torch.bool and listed.device.type == "cpu":  # a GPU would have to be waited for
            for number in listed[(listed < -length) | (listed >= length)][:1].tolist():
                raise IndexError(f"{what} {number} of {length}; {what}s are numbered 0 to {length - 1}")
        return listed
    number = int(listed)
    if not -length <= number < length:
        raise IndexError(f"{what} {number} of {length}; {what}s are numbered 0 to {length - 1}")
    return slice(number % length, number % length + 1)


def _listed(index: Any, what: str) -> Tensor:
    """Return a number, or a row of numbers or of a mask, as a tensor.

    Raises: IndexError for all else: a float would be cut off, and words, ... and None say nothing of samples and views.
    """
    try:
        listed = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        listed = torch.empty(())
    if listed.shape == (0,) and isinstance(index, Sequence):
        return listed.long()  # torch takes an empty list for floats
    whole = not (listed.is_floating_point() or listed.is_complex()) and (listed.dtype != torch.bool or listed.ndim == 1)
    if not whole or listed.ndim > 1:
        mend = "; batch.family(name) finds views by their family" if isinstance(index, str) else ""
        raise IndexError(f"{index!r:.60} is no index of {what}s; take a whole number, a slice, a row of numbers or a mask{mend}")
    return listed


def _split(index: Index | tuple[Index, ...], shape: tuple[int, ...]) -> tuple[slice | Tensor, slice | Tensor]:
    parts = index if isinstance(index, tuple) else (index, _EVERY)
    if len(parts) != 2:
        raise IndexError(f"index with {len(parts)} parts, views have two axes: samples and views")
    return _kept(parts[0], shape[0], "sample"), _kept(parts[1], shape[1], "view")


def _at(tensor: Tensor, b: slice | Tensor, v: slice | Tensor) -> Tensor:
    """Return samples b and views v of a tensor (B, V, ...)."""
    return tensor[b] if v is _EVERY else tensor[b][:, v]


def _check(owner: str, name: str, value: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> None:
    if value.shape == shape and dtype in (None, value.dtype):  # as most often
        return
    fits = value.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    if not fits:
        raise ValueError(f"{owner}.{name} has shape {tuple(value.shape)}, expected {shape} (None: any)")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{owner}.{name} is {value.dtype}, expected {dtype}")


def _shape(tensor: Tensor) -> str:
    """Say a tensor's shape and type, never its numbers: (16, 2, 3, 224, 224) float32."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _moved(container: Any, device: torch.device | str, non_blocking: bool) -> dict[str, Any]:
    return {
        field.name: value.to(device, non_blocking=non_blocking)
        for field in fields(container)
        if isinstance(value := getattr(container, field.name), Tensor)
    }


def _joined(parts: Sequence[Any]) -> Any:
    """Return containers of one kind joined along their samples; whatever has no sample axis must be the same in all."""
    joined: dict[str, Any] = {}
    for field in reversed(fields(parts[0])):  # settings stand last: a difference in them is named before shapes clash
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], ViewGeometry | Photometric):
            joined[field.name] = _joined(values)
        elif isinstance(values[0], Tensor) and field.name != "view":
            joined[field.name] = torch.cat(values)
        else:
            plain = [value.tolist() if isinstance(value, Tensor) else value for value in values]
            for other in plain:
                if other != plain[0]:
                    raise ValueError(
                        f"{field.name} is {plain[0]!r} in one batch and {other!r} in another; join batches of one {field.name}"
                    )
    return replace(parts[0], **joined)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Photometric:
    """The color numbers of every view, as drawn: all (B, V). From them `color.color_matrix` gives the matrix that is applied."""

    brightness: Tensor  # float32 factor, 1 leaves as is
    contrast: Tensor  # float32 factor, about 128
    saturation: Tensor  # float32 factor, in YIQ
    hue_rad: Tensor  # float32, in YIQ
    gray: Tensor  # bool
    blur_sigma_px: Tensor  # float32, pixels of the finished view; 0: none
    solarized: Tensor  # bool

    def __post_init__(self) -> None:
        shape = tuple(self.brightness.shape)
        _check("Photometric", "brightness", self.brightness, (None, None), torch.float32)
        for name in ("contrast", "saturation", "hue_rad", "blur_sigma_px"):
            _check("Photometric", name, getattr(self, name), shape, torch.float32)
        for name in ("gray", "solarized"):
            _check("Photometric", name, getattr(self, name), shape, torch.bool)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "Photometric":
        b, v = _split(index, self.gray.shape)
        return Photometric(**{field.name: _at(getattr(self, field.name), b, v) for field in fields(self)})

    def __repr__(self) -> str:
        return f"Photometric({tuple(self.gray.shape)}, {self.gray.device})"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Photometric":
        """Return the same on another device."""
        return replace(self, **_moved(self, device, non_blocking))

    @property
    def changed(self) -> Tensor:
        """Which views' color is not left alone, (B, V) bool."""
        factors = torch.stack([self.brightness, self.contrast, self.saturation], -1)
        return self.gray | self.solarized | (self.blur_sigma_px != 0) | (self.hue_rad != 0) | (factors != 1).any(-1)

    @staticmethod
    def unchanged(samples: int, views: int) -> "Photometric":
        """Return the numbers that leave color alone."""
        one, no = torch.ones(samples, views), torch.zeros(samples, views, dtype=torch.bool)
        nought = torch.zeros(samples, views)
        return Photometric(brightness=one, contrast=one, saturation=one, hue_rad=nought, gray=no, blur_sigma_px=nought, solarized=no)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ViewGeometry:
    """Where every view of one family came from: with the picture's bytes enough to render it again, without a generator."""

    boxes: Tensor  # (B, V, 4) float32, xyxy, source pixels, as cut
    flipped: Tensor  # (B, V) bool, mirrored left-right after resizing
    quarter_turns: Tensor  # (B, V) int64, 0 to 3, counter-clockwise, after the mirror
    source_size: Tensor  # (B, 2) int32, (height, width), upright
    stored_orientation: Tensor  # (B,) uint8, the file's EXIF orientation, 1 to 8, already undone in the source frame
    sample: Tensor  # (B,) int64, the picture shown
    drawn_for: Tensor  # (B,) int64, the sample whose draws these are; differs from `sample` where an invalid one was replaced
    view: Tensor  # (V,) int64, number within the family
    family: str
    size_px: tuple[int, int]  # (height, width) of the finished view
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        _check("ViewGeometry", "boxes", self.boxes, (None, None, 4), torch.float32)
        b, v = self.boxes.shape[:2]
        _check("ViewGeometry", "flipped", self.flipped, (b, v), torch.bool)
        _check("ViewGeometry", "quarter_turns", self.quarter_turns, (b, v), torch.int64)
        _check("ViewGeometry", "source_size", self.source_size, (b, 2), torch.int32)
        _check("ViewGeometry", "stored_orientation", self.stored_orientation, (b,), torch.uint8)
        _check("ViewGeometry", "sample", self.sample, (b,), torch.int64)
        _check("ViewGeometry", "drawn_for", self.drawn_for, (b,), torch.int64)
        _check("ViewGeometry", "view", self.view, (v,), torch.int64)

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def __repr__(self) -> str:
        drawn = f"size_px={self.size_px}, seed={self.seed}, epoch={self.epoch}"
        return f"ViewGeometry({self.family!r}, boxes {_shape(self.boxes)}, {drawn}, {self.boxes.device})"

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "ViewGeometry":
        b, v = _split(index, self.flipped.shape)
        both: dict[str, Any] = {name: _at(getattr(self, name), b, v) for name in ("boxes", "flipped", "quarter_turns")}
        each = {name: getattr(self, name)[b] for name in ("source_size", "stored_orientation", "sample", "drawn_for")}
        return replace(self, **both, **each, view=self.view[v])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "ViewGeometry":
        """Return the same on another device."""
        return replace(self, **_moved(self, device, non_blocking))

    @property
    def view_to_source(self) -> Tensor:
        """(B, V, 2, 3) float64: continuous view coordinates in [0, width] x [0, height] -> source pixels."""
        return geometry.view_to_source(self.boxes, self.flipped, self.quarter_turns, self.size_px)

    @property
    def source_to_view(self) -> Tensor:
        """(B, V, 2, 3) float64: source pixels -> view pixels."""
        return geometry.invert(self.view_to_source)

    def seen_from(self, other: "ViewGeometry") -> Tensor:
        """Return every view's box in every view of `other`, in that view's own pixels, mirrored and turned with it; nothing is clamped.

        Shapes: self (B, V), other (B, W) of the same pictures -> (B, V, W, 4) float64, xyxy.
        """
        maps = other.source_to_view.unsqueeze(1)  # (B, 1, W, 2, 3)
        return geometry.map_boxes(maps, self.boxes[:, :, None, None]).squeeze(-2)

    def common(self, other: "ViewGeometry") -> "CommonBoxes":
        """Return what every view shares with every view of `other`: in both views' own pixels, and how the one shows it beside the other.

        Shapes: self (B, V), other (B, W) of the same pictures -> CommonBoxes (B, V, W).
        """
        shared = geometry.intersection(self.boxes[:, :, None], other.boxes[:, None])  # (B, V, W, 4), source pixels
        area = geometry.area(shared)
        nothing = (area == 0).unsqueeze(-1)
        own = geometry.map_boxes(self.source_to_view, shared)
        of_other = geometry.map_boxes(other.source_to_view, shared.transpose(1, 2)).transpose(1, 2)
        # to undo self's turn and mirror, then mirror and turn as other: past a mirror a turn back is one forth
        flipped = self.flipped[:, :, None] ^ other.flipped[:, None]
        turns, other_turns = self.quarter_turns[:, :, None], other.quarter_turns[:, None]
        return CommonBoxes(
            boxes=own.masked_fill(nothing, 0),
            other_boxes=of_other.masked_fill(nothing, 0),
            area=area,
            flipped=flipped,
            quarter_turns=(other_turns + torch.where(flipped, turns, -turns)) % 4,
        )

    def overlap_area(self, other: "ViewGeometry") -> Tensor:
        """Return the source area shared by every view and every view of `other`: (B, V, W) float64, square source pixels."""
        return geometry.overlap_area(self.boxes[:, :, None], other.boxes[:, None])

    def iou(self, other: "ViewGeometry") -> Tensor:
        """Return intersection over union with every view of `other`: (B, V, W) float64."""
        return geometry.iou(self.boxes[:, :, None], other.boxes[:, None])

    def token_boxes(self, grid: tuple[int, int]) -> Tensor:
        """Return where every token cell lies in the source: (B, V, rows * cols, 4) float64, n = row * cols + col."""
        return geometry.token_boxes(self.view_to_source, self.size_px, grid)

    def tokens_seen_from(self, other: "ViewGeometry", grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return every token cell in the pixels of every view of `other`, and which part of it that view shows.

        Shapes: grid (rows, cols) of N cells -> boxes (B, V, W, N, 4) float64 and fraction (B, V, W, N) float64.
        """
        cells = geometry.map_boxes(other.source_to_view.unsqueeze(1), self.token_boxes(grid).unsqueeze(2))
        return cells, geometry.visible_fraction(cells, other.size_px)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CommonBoxes:
    """What views show of the same place: V views of a record, W of another, every pair of them.

    What the one shows in its box, mirrored left-right where `flipped`, then turned by `quarter_turns`, is what the other shows in its own:
    as `roi_align` takes both. A pair that shares nothing has an area of 0 and boxes of zeros.
    """

    boxes: Tensor  # (B, V, W, 4) float64, xyxy, pixels of the one view, mirrored and turned with it
    other_boxes: Tensor  # (B, V, W, 4) float64, xyxy, pixels of the other view
    area: Tensor  # (B, V, W) float64, square source pixels
    flipped: Tensor  # (B, V, W) bool
    quarter_turns: Tensor  # (B, V, W) int64, 0 to 3, counter-clockwise, after the mirror

    def __repr__(self) -> str:
        return f"CommonBoxes({_shape(self.boxes)}, {self.boxes.device})"


RECORD_VERSION = 1  # of a record as JSON, told by its field `wherefrom_record`; another is refused
_VERSION_FIELD = "wherefrom_record"
_WORDS: dict[str, Any] = {"family": str, "size_px": tuple[int, int], "seed": int, "epoch": int}  # of a record, beside its tensors
_TENSORS: dict[str, tuple[tuple[str | int, ...], torch.dtype]] = {  # of a record: axes and type
    "sample": (("B",), torch.int64),
    "drawn_for": (("B",), torch.int64),
    "source_size": (("B", 2), torch.int32),
    "stored_orientation": (("B",), torch.uint8),
    "view": (("V",), torch.int64),
    "boxes": (("B", "V", 4), torch.float32),
    "flipped": (("B", "V"), torch.bool),
    "quarter_turns": (("B", "V"), torch.int64),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue_rad", "blur_sigma_px"), (("B", "V"), torch.float32)),
    **dict.fromkeys(("gray", "solarized", "valid", "accepted"), (("B", "V"), torch.bool)),
}
_RANGES = {"quarter_turns": (0, 3), "stored_orientation": (1, 8), "source_size": (1, 2**31 - 1)}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Record:
    """All that is decided about one family's views before a pixel moves: what a renderer renders by, and whether the law kept its word."""

    geometry: ViewGeometry  # (B, V)
    photometric: Photometric  # (B, V)
    valid: Tensor  # (B, V) bool; False: the picture was too small for the law and stands whole
    accepted: Tensor  # (B, V) bool; False: the law fell back on something else than it promises

    def __post_init__(self) -> None:
        shape = tuple(self.geometry.flipped.shape)
        _check("Record", "photometric", self.photometric.brightness, shape)
        _check("Record", "valid", self.valid, shape, torch.bool)
        _check("Record", "accepted", self.accepted, shape, torch.bool)

    @staticmethod
    def of(geometry: ViewGeometry, photometric: Photometric | None = None) -> "Record":
        """Return the record of views that no law drew: all valid and accepted, their color left alone without `photometric`."""
        every = torch.ones_like(geometry.flipped)
        return Record(
            geometry=geometry, photometric=photometric or Photometric.unchanged(*geometry.flipped.shape), valid=every, accepted=every
        )

    def __len__(self) -> int:
        return len(self.geometry)

    def __repr__(self) -> str:
        return f"Record({self.geometry!r})"

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "Record":
        b, v = _split(index, self.valid.shape)
        return Record(
            geometry=self.geometry[b, v],
            photometric=self.photometric[b, v],
            valid=_at(self.valid, b, v),
            accepted=_at(self.accepted, b, v),
        )

    def to_json(self) -> str:
        """Return the record as one line of JSON, of which `Record.from_json` makes an equal one: every number bit for bit.

        Its fields are those of the record, its geometry and its photometric numbers, tensors as nested lists, and the format's version.
        Raises: ValueError if a number is not finite.
        """
        geometry, photometric = self.geometry, self.photometric
        plain = {_VERSION_FIELD: RECORD_VERSION} | {name: getattr(geometry, name) for name in _WORDS}
        for name in _TENSORS:
            plain[name] = getattr(next(part for part in (geometry, photometric, self) if hasattr(part, name)), name)
        return to_json_line(plain)

    @staticmethod
    def from_json(text: str) -> "Record":
        """Return the record that a line of JSON holds, on the CPU. The text may come from anywhere: it is data, and checked.

        Numbers become the nearest float32. Whether a box leaves its picture is for the renderer to judge, as with any record.
        Raises: ValueError in one line if it is no record, of another version, lacks a field or has one too many, a field has another type
                or shape than its name says, or a number is one that no view has: five quarter turns, a box without pixels.
        """
        try:
            return Record._of_plain(from_json_line(text))
        except ValueError as problem:
            raise ValueError(f"record as JSON: {problem}") from None

    @staticmethod
    def _of_plain(plain: dict[str, Any]) -> "Record":
        version = plain.pop(_VERSION_FIELD, None)
        if type(version) is not int or version != RECORD_VERSION:
            raise ValueError(f"{_VERSION_FIELD} is {version!r:.20}, this version of the library reads {RECORD_VERSION}")
        names = {*_WORDS, *_TENSORS}
        for name in sorted(names ^ plain.keys()):
            raise ValueError(f"lacks {name}" if name in names else f"has a field {name!r:.40}, which no record has")
        words = plain | {"size_px": tuple(plain["size_px"]) if isinstance(plain["size_px"], list) else plain["size_px"]}
        for name, annotation in _WORDS.items():
            check_literal(name, words[name], annotation)
        sides = {axis: len(plain[name]) if isinstance(plain[name], list) else 0 for axis, name in (("B", "sample"), ("V", "view"))}
        tensors = {
            name: to_tensor(name, plain[name], tuple(sides[side] if isinstance(side, str) else side for side in axes), dtype)
            for name, (axes, dtype) in _TENSORS.items()
        }
        for name, (low, high) in _RANGES.items():
            for number in tensors[name][(tensors[name] < low) | (tensors[name] > high)][:1].tolist():
                raise ValueError(f"{name}: {number}, needs {low} to {high}")
        if not bool((tensors["boxes"][..., :2] < tensors["boxes"][..., 2:]).all()):
            raise ValueError("boxes: one is empty, needs x0 < x1 and y0 < y1")

        def of(kind: Any) -> dict[str, Any]:
            return {field.name: tensors.get(field.name, words.get(field.name)) for field in fields(kind)}

        own = {"geometry": ViewGeometry(**of(ViewGeometry)), "photometric": Photometric(**of(Photometric))}
        return Record(**of(Record) | own)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Views:
    """The views of one family: pixels with their records."""

    pixels: Tensor  # (B, V, C, H, W) uint8, or normalized float
    geometry: ViewGeometry
    valid: Tensor  # (B, V) bool; False: the picture was too small for the law and stands whole
    photometric: Photometric

    def __post_init__(self) -> None:
        b, v = self.geometry.boxes.shape[:2]
        _check("Views", "pixels", self.pixels, (b, v, None, *self.geometry.size_px))
        _check("Views", "valid", self.valid, (b, v), torch.bool)
        _check("Views", "photometric", self.photometric.brightness, (b, v))

    @staticmethod
    def of(record: Record, pixels: Tensor) -> "Views":
        """Return the views that a renderer made by a record: pixels (B, V, C, H, W)."""
        return Views(pixels=pixels, geometry=record.geometry, valid=record.valid, photometric=record.photometric)

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __repr__(self) -> str:
        return f"Views({self.geometry.family!r}, pixels {_shape(self.pixels)}, {self.pixels.device})"

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "Views":
        b, v = _split(index, self.valid.shape)
        return Views(
            pixels=_at(self.pixels, b, v),
            geometry=self.geometry[b, v],
            valid=_at(self.valid, b, v),
            photometric=self.photometric[b, v],
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Views":
        """Return the same on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in ("pixels", "geometry", "valid", "photometric")}
        return Views(**moved)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """One micro-batch: which samples, and their views, a family after the other in the recipe's order."""

    sample: Tensor  # (B,) int64, the pictures shown
    drawn_for: Tensor  # (B,) int64, the samples whose draws these are
    label: Tensor  # (B,) int64, -1: none
    source_size: Tensor  # (B, 2) int32, (height, width), upright
    views: tuple[Views, ...]

    def __post_init__(self) -> None:
        _check("Batch", "sample", self.sample, (None,), torch.int64)
        b = len(self.sample)
        _check("Batch", "drawn_for", self.drawn_for, (b,), torch.int64)
        _check("Batch", "label", self.label, (b,), torch.int64)
        _check("Batch", "source_size", self.source_size, (b, 2), torch.int32)
        for views in self.views:
            _check("Batch", f"views[{views.geometry.family!r}].pixels", views.pixels, (b, None, None, None, None))

    def __len__(self) -> int:
        return len(self.sample)

    def __repr__(self) -> str:
        families = ", ".join(f"{views.geometry.family!r} {_shape(views.pixels)}" for views in self.views)
        return f"Batch({len(self)} samples, {families}, {self.sample.device})"

    def __getitem__(self, index: Index) -> "Batch":
        if isinstance(index, tuple):
            raise IndexError(f"index with {len(index)} parts, a batch has one axis: samples; index the views of a family for both")
        b = _kept(index, len(self), "sample")
        each = {name: getattr(self, name)[b] for name in ("sample", "drawn_for", "label", "source_size")}
        return Batch(**each, views=tuple(views[b, :] for views in self.views))

    def family(self, name: str) -> Views:
        """Return the views of the family called `name`."""
        for views in self.views:
            if views.geometry.family == name:
                return views
        raise KeyError(f"family {name!r}: this batch holds {[views.geometry.family for views in self.views]}")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the same on another device."""
        moved = _moved(self, device, non_blocking)
        return replace(self, **moved, views=tuple(views.to(device, non_blocking=non_blocking) for views in self.views))

    @staticmethod
    def concatenate(batches: Sequence["Batch"]) -> "Batch":
        """Return batches of one recipe, seed and epoch as one, their samples in the given order.

        Raises: ValueError if there are none, or they differ in family, view, size, seed or epoch: a record holds one of each.
        """
        if not batches:
            raise ValueError("no batches to concatenate; give at least one")
        counts = {len(batch.views) for batch in batches}
        if len(counts) > 1:
            raise ValueError(f"batches hold {sorted(counts)} families; join batches of one recipe")
        names = ("sample", "drawn_for", "label", "source_size")
        each = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
        return Batch(**each, views=tuple(_joined(parts) for parts in zip(*(batch.views for batch in batches), strict=True)))
