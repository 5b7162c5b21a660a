"""Pictures to evaluate on: shards, cut into the views that a protocol asks for.

Here: where they come from, in blocks; the rows of a report.
Not here: the protocols (labels.py, pairs.py).
"""

import io
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from wherefrom.pipeline.loader import Loader, make_loader
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Batch, Record
from wherefrom.train.objectives.pairs import PairObjective
from wherefrom.train.ranks import Ranks

Table = tuple[tuple[str, ...], ...]
K = TypeVar("K", bound=Hashable)

ReportProgress = Callable[[str, int, int], None]  # what is done, so far, in all


class PictureSource(Protocol):
    """A set of pictures, numbered from 0, of which views can be cut by any recipe."""

    def __len__(self) -> int: ...

    def views(self, recipe: ViewRecipe, sample: NDArray[np.int64], drawn_for: NDArray[np.int64] | None = None, epoch: int = 0) -> Batch:
        """Return the views of these pictures by the draws of `drawn_for` (default: their own)."""
        ...

    def one_color_views(self, recipe: ViewRecipe, sample: NDArray[np.int64]) -> Batch:
        """Return the same views of pictures that have the same sizes and show one color each."""
        ...


@runtime_checkable
class LabeledSource(Protocol):
    """Pictures whose labels are known before any of them is looked at."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each picture, (N,), -1 of none."""


class ShardPictures:
    """The pictures of an index, cut by the same loader as in training, always from seed 0."""

    def __init__(
        self, index: ShardIndex, *, renderer: str = "auto", threads: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.index = index
        self._options: dict[str, Any] = {"renderer": renderer, "threads": threads, "device": device}
        self._loaders: dict[str, Loader] = {}

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each picture, (N,), -1 of none."""
        return self.index.label

    def views(self, recipe: ViewRecipe, sample: NDArray[np.int64], drawn_for: NDArray[np.int64] | None = None, epoch: int = 0) -> Batch:
        """Return the views of these pictures by the draws of `drawn_for` (default: their own)."""
        return self._loader(recipe).batch(sample, drawn_for, epoch)

    def one_color_views(self, recipe: ViewRecipe, sample: NDArray[np.int64]) -> Batch:
        """Return the same views, through the same renderer, of JPEGs that have the same sizes and show one color each."""
        loader = self._loader(recipe)
        batch = loader.batch(sample).to("cpu")
        upright = torch.ones(len(batch), dtype=torch.uint8)
        records = [Record.of(replace(views.geometry, stored_orientation=upright), views.photometric) for views in batch.views]
        sizes = batch.source_size.tolist()
        rendered = loader.renderer.render([_one_color_jpeg(i, hw) for i, hw in zip(batch.sample.tolist(), sizes, strict=True)], records)
        views = (replace(views, pixels=pixels.cpu()) for views, pixels in zip(batch.views, rendered.pixels, strict=True))
        return replace(batch, views=tuple(views)).to(loader.device)

    def _loader(self, recipe: ViewRecipe) -> Loader:
        if recipe.fingerprint not in self._loaders:
            loader = make_loader(self.index, recipe, seed=0, global_batch=1, order="sequential", prefetch=1, **self._options)
            self._loaders[recipe.fingerprint] = loader
        return self._loaders[recipe.fingerprint]

    def close(self) -> None:
        """End the loaders' threads."""
        while self._loaders:
            self._loaders.popitem()[1].close()

    def __enter__(self) -> "ShardPictures":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _one_color_jpeg(sample: int, hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the bytes of a JPEG of one color, which belongs to the sample."""
    color = tuple(np.random.Generator(np.random.Philox(key=sample)).integers(0, 256, 3).tolist())
    encoded = io.BytesIO()
    Image.new("RGB", (hw[1], hw[0]), color).save(encoded, "JPEG", quality=95)
    return np.frombuffer(encoded.getvalue(), np.uint8)


@contextmanager
def evaluation_mode(*modules: nn.Module | PairObjective) -> Iterator[None]:
    """Put modules into evaluation mode without gradients, and back."""
    modes = [module.training for module in modules]
    for module in modules:
        module.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def encoded(
    ids: NDArray[np.int64], encode: Callable[[NDArray[np.int64]], Mapping[K, Tensor]], ranks: Ranks | None = None, *, batch: int = 64
) -> dict[K, Tensor]:
    """Return what `encode` makes of pictures in blocks, which ranks share: tensors (n, ...) of a block, joined in order, by their keys.

    So what becomes of a picture does not depend on how many ranks there are. Every rank gets all of it, on the processor if there are more.
    """
    ranks = ranks or Ranks(0, 1)
    shares = list(blocks(ids, batch))
    own = [encode(block) for block in shares[ranks.rank :: ranks.count]]
    kinds = own[0] if own else encode(shares[0])  # a rank without a block learns what there is
    return {key: ranks.in_turn([block[key] for block in own]) for key in kinds}


def blocks(ids: NDArray[np.int64], batch: int = 64) -> Iterator[NDArray[np.int64]]:
    """Yield ids in rows of `batch`."""
    for first in range(0, len(ids), batch):
        yield ids[first : first + batch]
