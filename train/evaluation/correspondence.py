"""Whether tokens of two views that show the same place are each other's nearest: equivariance under the record's own maps.

Here: the protocol; which cells of two views show the same place, by their records.
Not here: absolute positions (positions.py), relative ones (pair_geometry.py).
Source: ours, as token matching at known places is reported by others (DINOv2, Probe3D); no figures of theirs compare.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.pipeline.geometry import compose, map_points
from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.views import ViewGeometry, Views
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.features import CHANCE, RAW, Evaluation, Part, raw_tokens
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCorrespondence:
    """Two square crops of a held-out picture, at the size of whole pictures; tokens behind the last block, by cosine.

    Of every token of the first whose middle the second shows, the nearest token of the second should lie in the cell that shows it: how
    often it does, and how often it is no farther from it than so many cells, along rows or columns. Then the second crop mirrored, and
    turned by a quarter. Chance: any token of the second.
    """

    version: int = 1
    needs: tuple[Need, ...] = ()
    parts: tuple[Part, ...] = ()
    pictures: int = 500
    area_frac: tuple[float, float] = (0.3, 1.0)  # of the picture, of a crop
    distances: tuple[int, ...] = (0, 1, 2)  # in cells

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield the share of tokens that are within each distance, of every kind of second crop."""
        rows, cols = evaluation.grid()
        if rows * cols < 2:
            raise NotMeasuredError("the network makes a single token of a picture: it is always the right one")
        counts = self._counts(evaluation, (rows, cols))
        for kind in KINDS:
            for number, distance in enumerate(self.distances):
                for column in (*evaluation.networks, RAW, CHANCE):
                    hits, seen = counts[kind, column][[number, -1]].tolist()
                    row = f"{kind}: {'the right cell' if not distance else f'at most {distance} off'}"
                    yield Score(row=row, features=column, value=hits / seen if seen else float("nan"))

    def _counts(self, evaluation: Evaluation, grid: tuple[int, int]) -> dict[tuple[str, str], Tensor]:
        """Return how many tokens are within each distance, and, last, of how many: (distances + 1,) float64, by kind and column."""
        law = Independent(area_frac=self.area_frac, aspect=(1.0, 1.0))
        recipe = evaluation.recipe(replace(evaluation.family("correspondence", law=law), views=2))
        ids = evaluation.ids("held_out", self.pictures)
        columns = (*evaluation.networks, RAW, CHANCE)
        of_blocks: dict[tuple[str, str], list[Tensor]] = {(kind, column): [] for kind in KINDS for column in columns}
        for number, batch in evaluation.batches("held_out", recipe, ids, own=True):
            views = batch.views[0]
            first, valid = views[:, :1], views.valid.all(1)
            tokens = _tokens(evaluation.networks, first, grid)
            for kind, second in second_crops(views[:, 1:]).items():
                others = _tokens(evaluation.networks, second, grid)
                right = same_cells(first.geometry, second.geometry, grid).masked_fill(~valid[:, None], -1)
                for column, found in self._found(tokens, others, right, grid).items():
                    of_blocks[kind, column].append(found.unsqueeze(0))
            evaluation.progress("correspondence", min(len(ids), (number + 1) * 64), len(ids))
        return {key: evaluation.joined(blocks).sum(0) for key, blocks in of_blocks.items()}

    def _found(self, tokens: dict[str, Tensor], others: dict[str, Tensor], right: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return the counts of a block by column, of tokens (B, 1, h, w, D) of both views and the right cells (B, N)."""
        seen, found = right >= 0, {}
        for column, values in tokens.items():
            nearest = nearest_tokens(values[:, 0].flatten(1, 2), others[column][:, 0].flatten(1, 2))
            apart = cells_apart(nearest, right.clamp(min=0), grid)
            found[column] = torch.stack([((apart <= distance) & seen).sum() for distance in self.distances] + [seen.sum()]).double()
        every = torch.arange(grid[0] * grid[1], device=right.device)
        apart = cells_apart(every, right.clamp(min=0)[..., None], grid)  # (B, N, cells)
        shares = [((apart <= distance).double().mean(-1) * seen).sum() for distance in self.distances]
        found[CHANCE] = torch.stack([*shares, seen.sum().double()])
        return found


KINDS = ("cropped", "mirrored", "turned")


def second_crops(views: Views) -> dict[str, Views]:
    """Return the second crops by kind, each with the record that says so; views are square, neither mirrored nor turned."""
    record = views.geometry
    mirrored = replace(record, flipped=~record.flipped)
    turned = replace(record, quarter_turns=record.quarter_turns + 1)
    return {
        "cropped": views,
        "mirrored": replace(views, pixels=views.pixels.flip(-1), geometry=mirrored),
        "turned": replace(views, pixels=views.pixels.rot90(1, (-2, -1)), geometry=turned),
    }


def _tokens(networks: Mapping[str, Encoder], views: Views, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return the tokens of views, (B, V, h, w, D), by column."""
    with torch.no_grad():
        tokens = {column: encoder.encode(views).tokens for column, encoder in networks.items()}
    return tokens | {RAW: raw_tokens(views.pixels, grid)}


def same_cells(first: ViewGeometry, second: ViewGeometry, grid: tuple[int, int]) -> Tensor:
    """Return which cell of the second view shows the middle of each cell of the first, by their records; -1 where none does.

    Shapes: records (B, 1) of the same pictures, grid (rows, cols) of N cells of both views -> (B, N) int64, row * cols + col.
    """
    (height, width), (rows, cols) = first.size_px, grid
    device = first.boxes.device
    y, x = ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) * side / n for n, side in ((rows, height), (cols, width)))
    middles = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (N, 2), row by row
    x, y = map_points(compose(second.source_to_view, first.view_to_source)[:, 0], middles).unbind(-1)  # (B, N)
    col, row = (x / second.size_px[1] * cols).floor().long(), (y / second.size_px[0] * rows).floor().long()
    inside = (col >= 0) & (col < cols) & (row >= 0) & (row < rows)
    return torch.where(inside, row * cols + col, -1)


def nearest_tokens(tokens: Tensor, others: Tensor) -> Tensor:
    """Return which of a view's tokens is most like each of another's, by cosine: (B, N, D) and (B, M, D) -> (B, N) int64."""
    return (F.normalize(tokens.float(), dim=-1) @ F.normalize(others.float(), dim=-1).mT).argmax(-1)


def cells_apart(first: Tensor, second: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how many cells two are apart, along rows or columns, whichever is more: numbers row * cols + col, of any shapes."""
    cols = grid[1]
    return torch.maximum((first // cols - second // cols).abs(), (first % cols - second % cols).abs())
