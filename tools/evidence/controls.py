"""Two objectives that are controls of SP: its targets taken from other pictures, and its views without its loss.

Here: both, with their settings.
Not here: which runs learn them (plan.py). Nothing of the library depends on this file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily
from wherefrom.pipeline.views import Batch, ViewGeometry, Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.objective import Encode, Objective, ObjectiveSettings, ParameterRule, Progress, Terms
from wherefrom.train.objectives import DINO, MAE, MoCoV3, SimCLR, SpatialPrediction, SpatialSettings

ON_VIEWS = "_on_views"  # ends the name of a host's term on SP's views


@dataclass(frozen=True, kw_only=True, slots=True)
class ShuffledSpatialSettings(SpatialSettings):
    """SP as set, but the targets of every picture are those of another one of its batch."""

    def objective(self, name: str) -> "ShuffledSpatialPrediction":
        """Return what is learned by these settings, under a name."""
        return ShuffledSpatialPrediction(self, name=name)


class ShuffledSpatialPrediction(SpatialPrediction):
    """SP whose targets say nothing of the views: the same views, head and weight, and a gradient that there is nothing to learn from.

    A picture is asked for the boxes, mirrors and turns of the one before it in the batch; a pair counts if it does in both pictures.
    """

    couples_samples = True

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        own = batch.family(self.name)
        if len(own.geometry) < 2:
            raise ValueError(f"objective {self.name!r} of a batch of 1: there is no other picture to take targets from; take more")
        shuffled = replace(own, geometry=of_another_picture(own.geometry), valid=own.valid & own.valid.roll(1, 0))

        def encode_own(views: Views | Tensor, *, keep: Tensor | None = None, positions: bool = True) -> Features:
            return encode(own if views is shuffled else views, keep=keep, positions=positions)  # the batch's: computed once a step

        others = tuple(shuffled if each is own else each for each in batch.views)
        return super().forward(replace(batch, views=others), encode_own, progress)


def of_another_picture(record: ViewGeometry) -> ViewGeometry:
    """Return records in which every picture of a batch has what was drawn for the one before it, the first that of the last."""
    rolled = {name: getattr(record, name).roll(1, 0) for name in ("boxes", "flipped", "quarter_turns", "source_size")}
    return replace(record, **rolled)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostOnSpatialViewsSettings:
    """A host that sees SP's views beside its own, and computes its own loss on them, too. SP's loss is not there.

    views: SP's settings, of which the law, the number, the side and the mirror count.
    views_weight: of the host's loss on them; 1: they have as much of a say as its own views.
    """

    host: ObjectiveSettings
    views: SpatialSettings
    views_weight: float = 1.0

    @property
    def size_px(self) -> int:
        """The side of the host's own views."""
        return self.host.size_px

    @property
    def weight(self) -> float:
        """The weight of the whole, which is the host's."""
        return self.host.weight

    def objective(self, name: str) -> "HostOnSpatialViews":
        """Return what is learned by these settings, under a name."""
        return HostOnSpatialViews(self, name=name)


class HostOnSpatialViews(Objective):
    """The host's loss on its own views, as ever, and once more on SP's: one network, one head, one teacher, the same settings.

    What is fair to a host is what it would do with such views by itself:
    SimCLR and MoCo v3 take two by two those of a picture (0 and 1, 2 and 3) for two views of it, told from the views of other pictures.
    DINO takes them for local views, of which the student says what its teacher says of the large ones.
    MAE tells the masked patches of each; they come at the side of its own views, for which masks and positions are made.
    They are cut and mirrored as SP has them, but colored as the host colors its views (DINO its local ones): left as they are, a contrast
    would be won by color, and the control would be weaker than it has to be.
    Without the second part, at a views_weight of 0, a run is the host's alone, bit for bit.
    """

    def __init__(self, settings: HostOnSpatialViewsSettings, *, name: str) -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.host = settings.host.objective(name)
        kind = next((kind for kind in _HOSTS if type(self.host) is kind), None)
        if kind is None:
            raise ValueError(f"objective {name!r}: {type(self.host).__name__} has no way to see SP's views; take one of {_names()}")
        self._how = _HOSTS[kind]
        self.weight = settings.weight
        self.term = self._how.term
        self.weights = {**self.host.weights, f"{self.term}{ON_VIEWS}": settings.views_weight * self.host.weights.get(self.term, 1.0)}
        self.couples_samples = self.host.couples_samples
        self.leaves_parameters_unused = self.host.leaves_parameters_unused
        self.families = (*self.host.families, self._family())

    def _family(self) -> ViewFamily:
        settings: Any = self.settings.host
        color: ColorLaw | None = getattr(settings, self._how.color)
        family = replace(self.settings.views.family(f"{self.name}_spatial"), color=color, turns=False)
        return replace(family, size_px=(settings.size_px, settings.size_px)) if self._how.own_size else family

    def setup(self, encoder: Encoder) -> None:
        """Set the host up, which may change the encoder as it does alone."""
        self.host.setup(encoder)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the host's term, and its mean over what SP's views are handed over as."""
        own: Terms = self.host(batch, encode, progress)
        batches = list(self._how.handed_over(self.host, batch, batch.family(self.families[-1].name)))
        on_views = torch.stack([self.host(each, encode, progress).losses[self.term] for each in batches]).mean()
        return Terms(losses={**own.losses, f"{self.term}{ON_VIEWS}": on_views}, meters=own.meters, seen=own.seen)

    def parts(self) -> dict[str, Mapping[str, float]]:
        """Return the weights of terms under which only the host's own part, or only that on SP's views, has a gradient."""
        whole = {self.term: 1.0, **self.weights}
        on_views = {name: name.endswith(ON_VIEWS) for name in whole}
        return {
            self.name: {name: 0.0 if on_views[name] else value for name, value in whole.items()},
            f"{self.name}{ON_VIEWS}": {name: value if on_views[name] else 0.0 for name, value in whole.items()},
        }

    def rule_for(self, name: str, parameter: nn.Parameter) -> ParameterRule:
        return self.host.rule_for(name.removeprefix("host."), parameter)

    def before_update(self, progress: Progress) -> None:
        self.host.before_update(progress)

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        self.host.after_step(encoder, progress, seen)

    def exported(self, encoder: Encoder) -> Encoder:
        return self.host.exported(encoder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _HowSeen:
    """How a host is shown views that are not its own."""

    term: str  # its only one
    handed_over: Callable[[Any, Batch, Views], Iterator[Batch]]  # batches in which they stand for views of its own
    color: str = "color"  # the setting whose color law they get
    own_size: bool = False  # they come as large as its own


def _as_pairs_of_a_family(host: SimCLR, batch: Batch, views: Views) -> Iterator[Batch]:
    for first in _firsts(views):
        yield _with(batch, {host.name: views[:, first : first + 2]})


def _as_pairs_of_families(host: MoCoV3, batch: Batch, views: Views) -> Iterator[Batch]:
    one, other = (family.name for family in host.families)
    for first in _firsts(views):
        yield _with(batch, {one: views[:, first], other: views[:, first + 1]})


def _as_local_views(host: DINO, batch: Batch, views: Views) -> Iterator[Batch]:
    yield _with(batch, {f"{host.name}_local": views})


def _as_own_views(host: MAE, batch: Batch, views: Views) -> Iterator[Batch]:
    yield _with(batch, {host.name: views})


_HOSTS: Mapping[type[Objective], _HowSeen] = MappingProxyType(
    {
        SimCLR: _HowSeen(term="contrast", handed_over=_as_pairs_of_a_family),
        MoCoV3: _HowSeen(term="contrast", handed_over=_as_pairs_of_families),
        DINO: _HowSeen(term="dino", handed_over=_as_local_views, color="local_color"),
        MAE: _HowSeen(term="pixels", handed_over=_as_own_views, own_size=True),
    }
)


def _names() -> str:
    return ", ".join(kind.__name__ for kind in _HOSTS)


def _firsts(views: Views) -> range:
    """Return the number of the first view of every two."""
    return range(0, views.pixels.shape[1] - 1, 2)


def _with(batch: Batch, shown: Mapping[str, Views]) -> Batch:
    """Return a batch in which other views stand under the names of families."""
    named = {name: replace(views, geometry=replace(views.geometry, family=name)) for name, views in shown.items()}
    return replace(batch, views=tuple(named.get(each.geometry.family, each) for each in batch.views))
