"""The one place where a record is drawn: where every view of a batch comes from, and how its color changes.

Here: `draw_records`, which loader, transform, proof and benches call; mirrors and quarter turns; pictures that are too small for a law.
Not here: what a record holds (views.py), how boxes and color are drawn (laws.py, color.py), pixels (render/).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from wherefrom.pipeline.color import draw_color
from wherefrom.pipeline.crops import Boxes
from wherefrom.pipeline.draws import PICTURE, Keys, Purpose, family_word, integer, random_words
from wherefrom.pipeline.view_recipe import Earlier, ViewFamily, ViewRecipe, law_name
from wherefrom.pipeline.views import Record, ViewGeometry

__all__ = ["draw_records"]


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


def _draw_boxes(family: ViewFamily, keys: Keys, source_size: NDArray[np.int32], earlier: Earlier) -> Boxes:
    """Draw one family's boxes by its law; a picture too small for it gives its whole frame as box, and an invalid view.

    Shapes: source_size (B, 2) (height, width); `earlier` holds the boxes of the families before it -> boxes (B, V, 4).
    Units:  source pixels, multiples of 1 or 1/1024 as `family.snap` says.
    Raises: ValueError in one line if the law draws another number of boxes, or leaves the picture.
    """
    law, views, size = family.law, family.views, source_size.astype(np.float64)
    small = law.smallest_side_px(law.frames(size, views, earlier)) < family.min_side_px  # (B, 1), or (B, V)
    drawable = np.where(small.all(1, keepdims=True), 256.0, size)  # any size will do: these rows are overwritten
    law_boxes = law.draw(keys, views, drawable, family.snap, earlier)
    whole = np.zeros((len(small), 1, 4))
    whole[:, 0, 2:] = size[:, ::-1]
    shape, expected = law_boxes.boxes.shape, (len(size), views, 4)
    if shape != expected:
        raise ValueError(f"the {law_name(law)} law of family {family.name!r} draws boxes of shape {shape}, expected {expected}")
    cut = Boxes(
        boxes=np.where(small[..., None], whole, law_boxes.boxes),
        valid=law_boxes.valid & ~small,
        accepted=law_boxes.accepted & ~small,
    )
    first, last = cut.boxes[..., :2], cut.boxes[..., 2:]
    inside = ((first >= 0) & (first < last) & (last <= whole[..., 2:])).all(-1) | small
    if not inside.all():
        row, view = np.argwhere(~inside)[0]
        raise ValueError(
            f"the {law_name(law)} law of family {family.name!r} draws {cut.boxes[row, view].tolist()} in a picture of (height, width) "
            f"{tuple(source_size[row].tolist())}; boxes are x0 < x1, y0 < y1 within it, as snap_boxes leaves them"
        )
    return cut


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
