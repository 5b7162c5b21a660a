"""The one place where a record is drawn: where every view of a batch comes from, and how its color changes.

Here: `draw_records`, which loader, transform, proof and benches call; mirrors and quarter turns; pictures that are too small for a law;
what an objective draws for views that are there, keyed by their record: masks, permutations; how much of a picture views show.
Not here: what a record holds (views.py), how boxes and color are drawn (laws.py, color.py), pixels (render/).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.color import draw_color
from wherefrom.pipeline.crops import SUBPIXELS, Boxes
from wherefrom.pipeline.draws import PICTURE, Keys, Purpose, family_word, integer, named_seed, random_words, random_words_of_tensors
from wherefrom.pipeline.view_recipe import Earlier, ViewFamily, ViewRecipe, law_name
from wherefrom.pipeline.views import Record, ViewGeometry

__all__ = ["draw_records", "keyed_permutations", "keyed_uniform", "shown_frac"]


def draw_records(
    recipe: ViewRecipe,
    *,
    seed: int,
    epoch: int,
    drawn_for: NDArray[np.int64],
    source_size: NDArray[np.int32],
    sample: NDArray[np.int64] | None = None,
    stored_orientation: NDArray[np.uint8] | None = None,
) -> tuple[Record, ...]:
    """Draw the records of every family for a batch: functions of (seed, epoch, drawn_for, view), sizes and recipe, of nothing else.

    sample: the pictures shown, where they are not those that are drawn for; stored_orientation: EXIF orientations, 1 to 8 (default: 1).
    Shapes: drawn_for (B,), source_size (B, 2) (height, width) upright, sample (B,), stored_orientation (B,) -> one (B, V) a family.
    Returns: one record a family, in the recipe's order. Their tensors are the numbers a renderer cuts by, and share no memory with the
             arrays given.
    """
    sample = drawn_for if sample is None else sample
    stored = np.ones(len(sample), np.uint8) if stored_orientation is None else stored_orientation
    earlier: dict[str, NDArray[np.float64]] = {}
    records = []
    for family in recipe.families:
        keys = Keys(seed=seed, epoch=epoch, drawn_for=drawn_for, family=family_word(family.name))
        cut = _draw_boxes(family, keys, source_size, earlier)
        earlier[family.name] = cut.boxes
        flipped, turns = _draw_orientation(family, keys)
        geometry = ViewGeometry(
            boxes=torch.from_numpy(cut.boxes.astype(np.float32)),
            flipped=torch.from_numpy(flipped),
            quarter_turns=torch.from_numpy(turns),
            source_size=torch.tensor(source_size),
            stored_orientation=torch.tensor(stored),
            sample=torch.tensor(sample),
            drawn_for=torch.tensor(drawn_for),
            view=torch.arange(family.views),
            family=family.name,
            size_px=family.size_px,
            seed=seed,
            epoch=epoch,
        )
        valid, accepted = torch.from_numpy(cut.valid), torch.from_numpy(cut.accepted)
        records.append(Record(geometry=geometry, photometric=draw_color(family, keys), valid=valid, accepted=accepted))
    return tuple(records)


def shown_frac(recipe: ViewRecipe, source_size: NDArray[np.int32]) -> float:
    """Return the share of a picture that lies in the rectangle around all its views, in the mean of one draw for each of some sizes.

    Shapes: source_size (B, 2), (height, width) upright.
    """
    records = draw_records(recipe, seed=0, epoch=0, drawn_for=np.arange(len(source_size)), source_size=source_size)
    boxes = torch.cat([record.geometry.boxes for record in records], 1).double()  # (B, V, 4)
    sides = boxes[..., 2:].amax(1) - boxes[..., :2].amin(1)
    return float((sides.prod(-1) / records[0].geometry.source_size.prod(-1)).mean())


def keyed_uniform(record: ViewGeometry, name: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw numbers for every view of a record, uniform in (0, 1): functions of its seed, epoch, sample, family and view, and of the name.

    So neither rank, micro-batch and batch size nor what ran before changes them. `name` is the drawer's own: one that begins with the
    name of an objective is nobody else's.
    Shapes: record (B, V) -> (B, V, *shape) float64, multiples of 2^-33, on the record's device, which is not waited for.
    """
    numbers = math.prod(shape)
    words = random_words_of_tensors(
        named_seed(record.seed, name),
        record.epoch,
        record.drawn_for[:, None, None],
        family_word(record.family),
        record.view[:, None],
        Purpose.NAMED,
        torch.arange(-(-numbers // 4), device=record.drawn_for.device),
    )  # (B, V, blocks, 4)
    return ((words.flatten(-2)[..., :numbers].double() + 0.5) / 2**32).reshape(*words.shape[:2], *shape)


def keyed_permutations(record: ViewGeometry, name: str, n: int) -> Tensor:
    """Draw a permutation of 0 to n - 1 for every view of a record, keyed as `keyed_uniform`: its first k are a random subset of k.

    Shapes: record (B, V) -> (B, V, n) int64, on the record's device.
    """
    return keyed_uniform(record, name, (n,)).argsort(dim=-1, stable=True)


def _draw_boxes(family: ViewFamily, keys: Keys, source_size: NDArray[np.int32], earlier: Earlier) -> Boxes:
    """Draw one family's boxes by its law; a picture too small for it gives its whole frame as box, and an invalid view.

    Shapes: source_size (B, 2) (height, width); `earlier` holds the boxes of the families before it -> boxes (B, V, 4).
    Units:  source pixels, multiples of 1 or 1/1024 as `family.snap` says.
    Raises: ValueError in one line if the law draws what are no boxes, another number of them, or leaves the picture or its grid.
    """
    law, views, size = family.law, family.views, source_size.astype(np.float64)
    small = np.asarray(law.smallest_side_px(law.frames(size, views, earlier)) < family.min_side_px)  # (B, 1), or (B, V)
    if small.shape not in ((len(size), 1), (len(size), views)):
        raise ValueError(
            f"{_law_of(family)} tells smallest sides of shape {small.shape}, expected {(len(size), 1)} or {(len(size), views)}, one a frame"
        )
    drawable = np.where(small.all(1, keepdims=True), 256.0, size)  # any size will do: these rows are overwritten
    made = law.draw(keys, views, drawable, family.snap, earlier)
    whole = np.zeros((len(small), 1, 4))
    whole[:, 0, 2:] = size[:, ::-1]
    _check_made(made, (len(size), views), family)
    cut = Boxes(boxes=np.where(small[..., None], whole, made.boxes), valid=made.valid & ~small, accepted=made.accepted & ~small)
    _check_boxes(cut.boxes, small, source_size, family)
    return cut


def _law_of(family: ViewFamily) -> str:
    """Say whose law it is, for messages alone: a law's name is looked up in the tables of installed packages."""
    return f"the {law_name(family.law)} law of family {family.name!r}"


def _check_made(made: object, shape: tuple[int, int], family: ViewFamily) -> None:
    """Raise ValueError unless a law drew `Boxes` for so many pictures and views: numbers, and two words of yes or no, as arrays."""
    if not isinstance(made, Boxes):
        raise ValueError(f"{_law_of(family)} draws {type(made).__name__}, expected Boxes, e.g. Boxes.all_kept(boxes)")
    for name, expected, kinds in (("boxes", (*shape, 4), "fiu"), ("valid", shape, "b"), ("accepted", shape, "b")):
        array = getattr(made, name)
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{_law_of(family)} draws {name} as {type(array).__name__}, expected an array of shape {expected}")
        if array.shape != expected or array.dtype.kind not in kinds:
            needed = "bool" if kinds == "b" else "numbers"
            raise ValueError(f"{_law_of(family)} draws {name} of shape {array.shape} and {array.dtype}, expected {expected} of {needed}")


def _check_boxes(boxes: NDArray[np.float64], small: NDArray[np.bool_], source_size: NDArray[np.int32], family: ViewFamily) -> None:
    """Raise ValueError if boxes (B, V, 4) leave their pictures, but for those too small, (B, 1) or (B, V), or float32 cannot hold them."""
    first, last = boxes[..., :2], boxes[..., 2:]
    inside = ((first >= 0) & (first < last) & (last <= source_size[:, None, ::-1])).all(-1) | small
    places = boxes * SUBPIXELS
    exact = (places == np.rint(places)).all(-1)
    if (inside & exact).all():
        return
    row, view = np.argwhere(~(inside & exact))[0]
    need = "multiples of 1/1024 pixel" if inside[row, view] else "x0 < x1, y0 < y1 within it"
    raise ValueError(
        f"{_law_of(family)} draws {boxes[row, view].tolist()} in a picture of (height, width) "
        f"{tuple(source_size[row].tolist())}; boxes are {need}, as snap_boxes leaves them"
    )


def _draw_orientation(family: ViewFamily, keys: Keys) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return mirrors (B, V) bool and quarter turns (B, V) int64, 0 to 3, as the family's policy has them."""
    shape = (len(keys.drawn_for), family.views)
    flipped = np.zeros(shape, bool)
    turns = np.zeros(shape, np.int64)
    if family.mirror == "view":
        flipped = keys.words_for(family.views, Purpose.MIRROR)[:, :, 0, 0] >= 1 << 31
    elif family.mirror == "picture":
        words = random_words(keys.seed, keys.epoch, keys.drawn_for, PICTURE, 0, Purpose.MIRROR)
        flipped = np.repeat(words[:, :1] >= 1 << 31, family.views, axis=1)
    if family.turns:
        turns = integer(keys.words_for(family.views, Purpose.TURN)[:, :, 0, 0], 4)
    return flipped, turns
