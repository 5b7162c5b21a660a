"""How good an encoder is by labels: neighbours and a linear probe, each beside what needs no learning.

Here: the pictures that evaluations draw and cut views of, protocols by name and version, the report as plain data and as tables.
Not here: pair geometry (pair_geometry.py), when to evaluate (loop.py). Nothing here changes a weight.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from wherefrom.pipeline.loader import Loader, make_loader
from wherefrom.pipeline.order import Order
from wherefrom.pipeline.recipe import Centre, Grid, Recipe, ViewFamily
from wherefrom.pipeline.render import RendererName
from wherefrom.pipeline.shards import ShardIndex
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import random_scope

GRID = Grid(rows=3, cols=3, side_frac=0.4)
RAW_PX = 32
NEIGHBOURS, TEMPERATURE = 20, 0.07
KNN_PROTOCOL = "knn20-cosine-t0.07-grid3x3w0.4-mean-tokens@2"
PROBE_PROTOCOL = "ridge-grid3x3w0.4-mean-tokens@2"
PROTOCOL_NAMES = {KNN_PROTOCOL: "k-NN", PROBE_PROTOCOL: "linear probe"}  # for curves and tables
DRAW_SEED = int.from_bytes(b"evaluate")  # a number that no run takes for its own order
RIDGE = tuple(10.0**power for power in range(-4, 3))  # times the number of samples

Table = tuple[tuple[str, ...], ...]
Progress = Callable[[str, int, int], None]


class Pictures(Protocol):
    """A set of pictures, numbered from 0, of which views can be cut by any recipe."""

    def __len__(self) -> int: ...

    def views(self, recipe: Recipe, sample: NDArray[np.int64], drawn_for: NDArray[np.int64] | None = None, epoch: int = 0) -> Batch:
        """Return the views of these pictures by the draws of `drawn_for` (default: their own)."""
        ...

    def plain_views(self, recipe: Recipe, sample: NDArray[np.int64]) -> Batch:
        """Return the same views of pictures that have the same sizes and show one colour each."""
        ...


class ShardPictures:
    """The pictures of an index, cut by the same loader as in training, always from seed 0."""

    def __init__(
        self, index: ShardIndex, *, renderer: RendererName = "auto", threads: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.index = index
        self._options: dict[str, Any] = {"renderer": renderer, "threads": threads, "device": device}
        self._loaders: dict[str, Loader] = {}

    def __len__(self) -> int:
        return len(self.index)

    def views(self, recipe: Recipe, sample: NDArray[np.int64], drawn_for: NDArray[np.int64] | None = None, epoch: int = 0) -> Batch:
        """Return the views of these pictures by the draws of `drawn_for` (default: their own)."""
        return self._loader(recipe).batch(sample, drawn_for, epoch)

    def plain_views(self, recipe: Recipe, sample: NDArray[np.int64]) -> Batch:
        """Return the same views, through the same renderer, of JPEGs that have the same sizes and show one colour each."""
        loader = self._loader(recipe)
        batch = loader.batch(sample).to("cpu")
        upright = torch.ones(len(batch), dtype=torch.uint8)
        records = [(replace(views.geometry, stored_orientation=upright), views.photometric) for views in batch.views]
        sizes = batch.source_size.tolist()
        rendered = loader.renderer.render([_plain_jpeg(i, hw) for i, hw in zip(batch.sample.tolist(), sizes, strict=True)], records)
        views = (replace(views, pixels=pixels.cpu()) for views, pixels in zip(batch.views, rendered.pixels, strict=True))
        return replace(batch, views=tuple(views)).to(loader.device)

    def _loader(self, recipe: Recipe) -> Loader:
        if recipe.fingerprint not in self._loaders:
            made = make_loader(self.index, recipe, seed=0, global_batch=1, order="sequential", prefetch=1, **self._options)
            self._loaders[recipe.fingerprint] = made
        return self._loaders[recipe.fingerprint]

    def close(self) -> None:
        """End the loaders' threads."""
        while self._loaders:
            self._loaders.popitem()[1].close()

    def __enter__(self) -> "ShardPictures":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain_jpeg(sample: int, hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the bytes of a JPEG of one colour, which belongs to the sample."""
    colour = tuple(np.random.Generator(np.random.Philox(key=sample)).integers(0, 256, 3).tolist())
    encoded = io.BytesIO()
    Image.new("RGB", (hw[1], hw[0]), colour).save(encoded, "JPEG", quality=95)
    return np.frombuffer(encoded.getvalue(), np.uint8)


@contextmanager
def judged(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode without gradients, and back."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def drawn_ids(pictures: Pictures, number: int | None) -> NDArray[np.int64]:
    """Return the ids of `number` pictures, the first of a permutation that only the size of the set decides; None: of all.

    So every run on the same data is judged by the same pictures, and fewer are the first of more. Never a stride: classes come sorted
    in some sets and in turn in others, where a stride meets a part of them.
    """
    total = len(pictures)
    chosen = total if number is None else min(number, total)
    return Order(samples=total, global_batch=1, seed=DRAW_SEED).ids(0, np.arange(chosen))


def blocks(ids: NDArray[np.int64], batch: int = 64) -> Iterator[NDArray[np.int64]]:
    """Yield ids in rows of `batch`."""
    for first in range(0, len(ids), batch):
        yield ids[first : first + batch]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScore:
    """Accuracy of one kind of features by one protocol."""

    protocol: str
    features: str
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelReport:
    """What labels say, by protocol: the encoder, and two floors beside it."""

    train: int
    held_out: int
    classes: int  # different labels among them all
    missing: int  # of them: shown by held-out pictures, by no training picture
    ceiling: float  # the accuracy that missing classes leave possible
    scores: tuple[LabelScore, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def tables(self) -> tuple[Table, ...]:
        """Return what was looked at, the accuracies with their heading first, and notes: rows of text within 80 columns."""
        names = tuple(dict.fromkeys(score.features for score in self.scores))
        protocols = tuple(dict.fromkeys(score.protocol for score in self.scores))
        rows = [(PROTOCOL_NAMES[protocol], *(f"{self.accuracy(protocol, name):.3f}" for name in names)) for protocol in protocols]
        notes = [(f"{PROTOCOL_NAMES[protocol]}: {protocol}",) for protocol in protocols]
        if self.missing:
            notes.append((f"classes without a training picture here: {self.missing}; at most {self.ceiling:.3f} can be right",))
        looked_at = f"labels: {self.train} training, {self.held_out} held-out pictures, {self.classes} classes"
        return ((looked_at,),), (("accuracy", *names), *rows), tuple(notes)

    def accuracy(self, protocol: str, features: str = "encoder") -> float:
        """Return one score."""
        return next(score.accuracy for score in self.scores if (score.protocol, score.features) == (protocol, features))


def evaluate_labels(
    encoder: Encoder,
    train: Pictures,
    held_out: Pictures,
    *,
    view_px: int,
    limit: int | None = None,
    held_out_limit: int | None = None,
    probe: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> LabelReport | None:
    """Judge features by labels; None where the pictures have none.

    Features are the mean tokens of 3 x 3 local views (0.4 of each side, `view_px`), side by side; raw pixels, the whole picture at 32 px;
    the random encoder has the same architecture. limits: how many pictures, drawn by `drawn_ids`; without `probe`, k-NN alone.
    """
    with random_scope(seed, "random encoder"):
        random = Encoder(encoder.settings).to(next(encoder.parameters()).device)
    encoders = {"encoder": encoder, "random encoder": random}
    asked, asked_labels = _described(encoders, held_out, view_px, held_out_limit, "features for labels: held out", progress)
    if not len(asked_labels):
        return None
    known, known_labels = _described(encoders, train, view_px, limit, "features for labels: train", progress)
    if not len(known_labels):
        return None
    named, ordinals = torch.cat([known_labels, asked_labels]).unique(return_inverse=True)  # labels need not be 0, 1, 2, ...
    known_labels, asked_labels = ordinals.split([len(known_labels), len(asked_labels)])
    answerable = torch.isin(asked_labels, known_labels)
    scores = []
    protocols = {KNN_PROTOCOL: nearest_neighbours, PROBE_PROTOCOL: ridge_probe} if probe else {KNN_PROTOCOL: nearest_neighbours}
    for protocol, predict in protocols.items():
        for name in known:
            said = predict(known[name], known_labels, asked[name], classes=len(named))
            scores.append(LabelScore(protocol=protocol, features=name, accuracy=float((said == asked_labels).double().mean())))
    return LabelReport(
        train=len(known_labels),
        held_out=len(asked_labels),
        classes=len(named),
        missing=len(asked_labels[~answerable].unique()),
        ceiling=float(answerable.double().mean()),
        scores=tuple(scores),
    )


def _described(
    encoders: Mapping[str, Encoder], pictures: Pictures, view_px: int, limit: int | None, what: str, progress: Progress | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return every kind of features, (N, D) each, and the labels (N,), of the pictures that have one."""
    grid = ViewFamily(name="grid", views=GRID.rows * GRID.cols, size_px=(view_px, view_px), law=GRID)
    whole = ViewFamily(name="whole", views=1, size_px=(RAW_PX, RAW_PX), law=Centre())
    recipe = Recipe(families=(grid, whole))
    chosen = drawn_ids(pictures, limit)
    found: dict[str, list[Tensor]] = {name: [] for name in (*encoders, "raw pixels")}
    named: list[Tensor] = []
    with judged(*encoders.values()):
        for ids in blocks(chosen):
            batch = pictures.views(recipe, ids)
            for name, encoder in encoders.items():
                tokens = encoder.encode(batch.family("grid")).tokens
                found[name].append(tokens.float().flatten(2, -2).mean(2).flatten(1))
            found["raw pixels"].append(batch.family("whole").pixels.float().flatten(1))
            named.append(batch.label)
            if progress is not None:
                progress(what, sum(map(len, named)), len(chosen))
    label = torch.cat(named)
    kept = label >= 0
    return {name: torch.cat(parts)[kept] for name, parts in found.items()}, label[kept]


def nearest_neighbours(
    train: Tensor, train_labels: Tensor, held_out: Tensor, *, classes: int, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """Return the label that the k most similar training features vote for, each with weight exp(cosine / temperature).

    Shapes: train (N, D), train_labels (N,) int64, held_out (M, D) -> (M,) int64.
    Source: DINO's protocol, arXiv 2104.14294; features as they are, not centred.
    """
    known = F.normalize(train, dim=-1)
    said = []
    for block in F.normalize(held_out, dim=-1).split(1024):
        similarity, nearest = (block @ known.mT).topk(min(k, len(known)), dim=-1)
        weight = (similarity / temperature).exp()
        said.append(weight.new_zeros(len(block), classes).scatter_add_(1, train_labels[nearest], weight).argmax(-1))
    return torch.cat(said)


def ridge_probe(train: Tensor, train_labels: Tensor, held_out: Tensor, *, classes: int) -> Tensor:
    """Return the labels that a linear map says: one-vs-rest ridge regression on standardised features, in closed form, float64.

    The penalty is the one of RIDGE that does best on a fifth of the training pictures when fitted to the others.
    Shapes: train (N, D), train_labels (N,) int64, held_out (M, D) -> (M,) int64.
    """
    mean, std = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    known, asked = (train.double() - mean) / std, (held_out.double() - mean) / std
    wanted = F.one_hot(train_labels, classes).double()
    with random_scope("ridge"):  # drawn: classes may come in turn, so that every fifth picture is of the same
        fifth = (torch.randperm(len(known)) % 5 == 0).to(known.device)
    tried = ridge_weights(known[~fifth], wanted[~fifth], RIDGE)
    right = [(_affine(known[fifth], weights).argmax(-1) == train_labels[fifth]).sum() for weights in tried]
    best = RIDGE[int(torch.stack(right).argmax())]
    return _affine(asked, ridge_weights(known, wanted, (best,))[0]).argmax(-1)


def ridge_weights(features: Tensor, wanted: Tensor, penalties: tuple[float, ...]) -> list[Tensor]:
    """Return the minimisers of |x W + c - y|^2 / N + penalty |W|^2, one a penalty, as (D + 1, C) with c last.

    Shapes: features (N, D), wanted (N, C), float64.
    """
    mean, level = features.mean(0), wanted.mean(0)
    centred = features - mean
    dual = len(features) < features.shape[1]  # (X'X + p)^-1 X'y = X'(XX' + p)^-1 y: the smaller matrix is taken apart
    values, vectors = torch.linalg.eigh((centred @ centred.mT if dual else centred.mT @ centred) / len(features))
    asked = (wanted - level if dual else centred.mT @ (wanted - level)) / len(features)
    solved = (vectors @ (vectors.mT @ asked / (values.clamp(min=0) + penalty).unsqueeze(-1)) for penalty in penalties)
    maps = (centred.mT @ solution if dual else solution for solution in solved)
    return [torch.cat([weights, (level - mean @ weights).unsqueeze(0)]) for weights in maps]


def _affine(features: Tensor, weights: Tensor) -> Tensor:
    return features @ weights[:-1] + weights[-1]
