"""The one place where a record is drawn: where every view of a batch comes from, and how its color changes.

Here: `draw_records`, which loader, transform, proof and benches call.
Not here: what a record holds (views.py), how its parts are drawn (crops.py, color.py), pixels (render/).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from wherefrom.pipeline.color import draw_color
from wherefrom.pipeline.crops import draw_boxes, draw_orientation
from wherefrom.pipeline.draws import Keys, family_word
from wherefrom.pipeline.view_recipe import ViewRecipe
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
        cut = draw_boxes(family, keys, source_size, earlier)
        earlier[family.name] = cut.boxes
        flipped, turns = draw_orientation(family, keys)
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
