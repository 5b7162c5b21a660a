"""What an objective is, and the one module that computes all of them in a step.

Here: the interface, of objectives and of their settings; the table of those; panels, by which they show what they learn from; the random
scope that each objective runs in; and `Step`, which DDP, FSDP and compile wrap.
Not here: any particular objective (objectives/), optimizer and loop (loop.py).
Promise: a plug-in leaves its host, the first objective, alone; at weight 0 it is absent, bit for bit, and is only logged.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.pipeline.view_recipe import ViewFamily
from wherefrom.pipeline.views import Batch, Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.over_ranks import batch_norm_over_ranks


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Terms:
    """What an objective says about a batch: named scalar losses, numbers to look at, and what `after_step` has to know.

    `seen` holds tensors whose mean over micro-batches and ranks is wanted in float32, without gradient: the batch mean for a center, say.
    Their names and shapes are the same in all micro-batches and ranks.
    """

    losses: Mapping[str, Tensor]
    meters: Mapping[str, Tensor] = field(default_factory=dict)
    seen: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Which update is made: number `update` of `updates`, counted from 0; the same before, in and after it."""

    update: int
    updates: int
    updates_per_epoch: int

    @property
    def epoch(self) -> float:
        """Epochs before this update, with their fraction."""
        return self.update / self.updates_per_epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterRule:
    """How a parameter learns where it does not as all others do."""

    decays: bool | None = None  # by the weight decay; None: as matrices do, and biases, norms, tokens and position tables do not
    lr_factor: float = 1.0  # of the learning rate
    constant_lr: bool = False  # the peak of the learning rate, whatever the schedule
    rest_epochs: float = 0.0  # in which it stays as it started

    def __post_init__(self) -> None:
        if not self.lr_factor >= 0 or not self.rest_epochs >= 0:
            raise ValueError(f"lr_factor={self.lr_factor}, rest_epochs={self.rest_epochs}: neither may be negative")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Panel:
    """Pictures that the picture of views shows beside them: what a network is given, or is to tell, of one picture."""

    title: str
    pictures: Tensor  # (rows, columns, 3, height, width), normalized as views are
    labels: Sequence[str]  # one a picture, row by row
    captions: Sequence[str] = ()  # lines beneath

    def __post_init__(self) -> None:
        shape = tuple(self.pictures.shape)
        if len(shape) != 5 or shape[2] != 3 or len(self.labels) != shape[0] * shape[1]:
            raise ValueError(
                f"panel {self.title!r}: pictures of shape {shape} with {len(self.labels)} labels, "
                "expected (rows, columns, 3, height, width) and a label for each of rows * columns"
            )


QUARTER_TURNS = ("as it is", "90° left", "180°", "90° right")  # 0 to 3, counter-clockwise, in words


class Encode(Protocol):
    """Encode views with the network that is trained: those of one family, or (B, V, 3, H, W) pixels that have no record.

    Without more arguments, and for a family of the batch as it came, the result is computed once a step, whoever asks.
    """

    def __call__(self, views: Views | Tensor, *, keep: Tensor | None = None, positions: bool = True) -> Features: ...


class Objective(nn.Module):
    """A task learned from views. It owns its heads and teachers; forward leaves no trace, state changes in `after_step` alone.

    What forward keeps for itself is lost when a run goes on from a checkpoint; `Terms.seen` carries what `after_step` needs.
    A learned objective's own parameters may go without gradient for a while; those of the encoder that no objective reaches before the
    first update are frozen. With several ranks, what the first update reaches has to be reached by all, unless `leaves_parameters_unused`.
    """

    name: str  # an identifier, stable: names its random streams and its state
    families: tuple[ViewFamily, ...]  # what the loader must deliver
    weight: float = 1.0  # of the whole objective; 0: computed without gradient, and logged
    weights: Mapping[str, float] = MappingProxyType({})  # of its terms, 1 where not named
    couples_samples: bool = False  # a sample's loss depends on others (BatchNorm, negatives): micro-batches are part of the method
    leaves_parameters_unused: bool = False  # some updates give no gradient to parameters that others do: ranks must not wait for it
    chance: float | None = None  # how often a guess is right, where forward has a meter `accuracy`: runs tell that of held-out pictures

    def setup(self, encoder: Encoder) -> None:
        """Build what depends on the encoder: heads, a teacher by `encoder.slow_copy()`. Only the host may change the encoder itself."""
        raise NotImplementedError

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the terms; the objective's loss is their sum weighted by `weights`."""
        raise NotImplementedError

    def rule_for(self, name: str, parameter: nn.Parameter) -> ParameterRule:
        """Return how a parameter learns: one of its own, by its name here, or, if this is the host, "encoder.model. ..." of the encoder."""
        return ParameterRule()

    def before_update(self, progress: Progress) -> None:
        """Do what comes between gradients and their clipping, once a step: change or drop gradients."""

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        """Do what follows an update, once a step and alike on all ranks: moving averages, centers.

        `seen`: means over micro-batches and ranks of what forward gave in `Terms.seen`.
        """

    def shown(self, batch: Batch) -> Sequence[Panel]:
        """Return what the picture of views shows of a batch of one picture beside its views: nothing, unless they alone do not tell.

        Also asked before `setup`. The batch lies on the processor, wherever the objective does.
        """
        return ()

    def exported(self, encoder: Encoder) -> Encoder:
        """Return the network that is evaluated by labels and written out, if this is the host: the encoder, or a teacher."""
        return encoder


@runtime_checkable
class ObjectiveSettings(Protocol):
    """Every choice of an objective: a frozen dataclass that makes it, and stands in the settings under its name in the table OBJECTIVES.

    A package adds its own by an entry point of group "wherefrom.objectives". No field is called `name`.
    """

    @property
    def size_px(self) -> int:
        """The side of its square views, as the encoder sees them."""

    @property
    def weight(self) -> float:
        """The weight of the whole objective, which a run gives it: by default 1 of a host, less of a plug-in."""

    def objective(self, name: str) -> Objective:
        """Return what is learned, not yet set up; its name is that of its family, its random streams and its state."""


OBJECTIVES = EntryTable(
    kind="objective",
    group="wherefrom.objectives",
    own={
        "spatial": "wherefrom.train.objectives.spatial:SpatialSettings",
        "dense": "wherefrom.train.objectives.spatial_dense:DenseSpatialSettings",
        "part": "wherefrom.train.objectives.part:PARTSettings",
        "gtsa": "wherefrom.train.objectives.gtsa:GTSASettings",
        "dino": "wherefrom.train.objectives.dino:DINOSettings",
        "moco_v3": "wherefrom.train.objectives.moco_v3:MoCoV3Settings",
        "simclr": "wherefrom.train.objectives.simclr:SimCLRSettings",
        "byol": "wherefrom.train.objectives.byol:BYOLSettings",
        "barlow": "wherefrom.train.objectives.barlow:BarlowTwinsSettings",
        "vicreg": "wherefrom.train.objectives.vicreg:VICRegSettings",
        "mae": "wherefrom.train.objectives.mae:MAESettings",
        "rotation": "wherefrom.train.objectives.rotation:RotationSettings",
        "context": "wherefrom.train.objectives.context:ContextSettings",
        "jigsaw": "wherefrom.train.objectives.jigsaw:JigsawSettings",
        "colorization": "wherefrom.train.objectives.colorization:ColorizationSettings",
    },
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepOutput:
    """The loss to be minimized, with gradient; without, every term ("objective/term", as the objective gave it), meter, and thing seen."""

    loss: Tensor
    losses: dict[str, Tensor]
    meters: dict[str, Tensor]
    seen: dict[str, Tensor]


@contextmanager
def random_scope(*words: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run with torch's generators, of the processor and of `device`, set from the words; put them back after.

    So the draws inside are a function of the words, and no draw outside depends on them: there is nothing to save.
    """
    device = torch.device(device)
    seed = int.from_bytes(hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=8).digest(), "big")
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def frozen_batch_norm_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers in training normalize by the batch without remembering it."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class Step(nn.Module):
    """An encoder and its objectives as one module: a batch in, all terms out. The first objective is the host, the others are plug-ins.

    Every objective runs in its own random scope, keyed by (seed, update, rank, micro-batch, name), a shared encoding in one keyed
    by its family; only the host's encodings update BatchNorm statistics. BatchNorm, of heads and teachers too, normalizes over all ranks.
    So a plug-in gives its host a gradient, and changes nothing else.
    Raises: ValueError if names clash or are no identifiers, no weight is positive, families of one name differ, or a plug-in's setup
    changes the encoder.
    """

    def __init__(self, encoder: Encoder, objectives: Sequence[Objective], *, seed: int) -> None:
        super().__init__()
        names = [objective.name for objective in objectives]
        if not names or len(set(names)) != len(names) or not all(name.isidentifier() for name in names):
            raise ValueError(f"objectives {names}: needs at least one, each with an identifier of its own as name")
        if min(objective.weight for objective in objectives) < 0 or max(objective.weight for objective in objectives) == 0:
            raise ValueError(
                f"weights {[objective.weight for objective in objectives]} of {names}: none may be negative, one must be positive"
            )
        self.seed = seed
        batch_norm_over_ranks(encoder)  # before teachers are copied from it
        self.encoder = encoder
        for number, objective in enumerate(objectives):
            before = {} if number == 0 else _state_of(encoder)
            with random_scope(seed, "setup", objective.name):
                objective.setup(encoder)
            batch_norm_over_ranks(objective)
            if number > 0:
                _refuse_changes(before, _state_of(encoder), objective.name)
        self.objectives = nn.ModuleDict({objective.name: objective for objective in objectives})
        self.families = united_families(objectives)

    def forward(self, batch: Batch, progress: Progress, *, rank: int = 0, micro: int = 0) -> StepOutput:
        """Compute every objective on a micro-batch, the `micro`-th of this rank in this update."""
        device = batch.sample.device
        key = (self.seed, progress.update, rank, micro)
        shared: dict[int, Features] = {}
        loss = torch.zeros((), device=device)
        losses: dict[str, Tensor] = {}
        meters: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        for number, (name, objective) in enumerate(self._items()):
            learns = torch.is_grad_enabled() and objective.weight > 0
            encode = self._encode(batch, shared, host=number == 0, key=key)
            with random_scope(*key, name, device=device), torch.set_grad_enabled(learns):
                terms: Terms = objective(batch, encode, progress)
            for term, value in terms.losses.items():
                losses[f"{name}/{term}"] = value.detach()
                if objective.weight > 0:
                    loss = loss + objective.weight * objective.weights.get(term, 1.0) * value
            meters |= {f"{name}/{meter}": value.detach() for meter, value in terms.meters.items()}
            seen |= {f"{name}/{thing}": value.detach().float() for thing, value in terms.seen.items()}
        return StepOutput(loss=loss, losses=losses, meters=meters, seen=seen)

    def before_update(self, progress: Progress) -> None:
        """Let every objective look at the gradients before they are clipped."""
        for name, objective in self._items():
            with self._scope_of_all_ranks(progress, "before", name), torch.no_grad():
                objective.before_update(progress)

    def after_step(self, progress: Progress, seen: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Let every objective follow an update; `seen` as `StepOutput` has it, the mean over micro-batches and ranks."""
        for name, objective in self._items():
            own = {thing.removeprefix(f"{name}/"): value for thing, value in seen.items() if thing.startswith(f"{name}/")}
            with self._scope_of_all_ranks(progress, "after", name), torch.no_grad():
                objective.after_step(self.encoder, progress, own)

    def exported(self) -> Encoder:
        """Return the network that the host wants evaluated and written out."""
        name, host = next(self._items())
        network = host.exported(self.encoder)
        if not isinstance(network, Encoder):
            raise ValueError(f"objective {name!r} exports {type(network).__name__}, expected an Encoder, such as encoder.slow_copy()")
        return network

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether some updates give no gradient to parameters that others do."""
        return any(objective.weight > 0 and objective.leaves_parameters_unused for _, objective in self._items())

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return which gradients are clipped by one norm: the encoder with the host's head, and each plug-in's head alone.

        One backward pass sums every objective's gradient into the encoder, where they cannot be told apart; so the encoder counts once,
        with the host, and a plug-in's head never enters that norm: with its gradient into the encoder stopped it leaves the host's step be.
        """
        groups = {name: [p for p in objective.parameters() if p.requires_grad] for name, objective in self._items()}
        host = next(iter(groups))
        groups[host] = [p for p in self.encoder.parameters() if p.requires_grad] + groups[host]
        return {name: parameters for name, parameters in groups.items() if parameters}

    def parameter_rules(self, *, layer_decay: float | None = None) -> dict[str, ParameterRule]:
        """Return how every parameter that learns does, as the objectives say; those of the encoder as the host says.

        layer_decay: what the learning rate of each layer of the encoder is multiplied by, from the last one down.
        """
        objectives = dict(self._items())
        host = next(iter(objectives.values()))
        factors = {} if layer_decay is None else self.encoder.layer_factors(layer_decay)
        rules = {}
        for full, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if full.startswith("encoder."):
                rule = host.rule_for(full, parameter)
                rules[full] = replace(rule, lr_factor=rule.lr_factor * factors.get(full.removeprefix("encoder.model."), 1.0))
            else:
                _, owner, own = full.split(".", 2)
                rules[full] = objectives[owner].rule_for(own, parameter)
        return rules

    def weight_of(self, name: str) -> float:
        """Return the weight of the objective called `name`."""
        return dict(self._items())[name].weight

    def freeze_unreached(self, batch: Batch, progress: Progress) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Find the parameters that no objective reaches on `batch` at first; freeze those that will not be reached later either.

        These are the encoder's, and what belongs to objectives of weight 0. An objective that is learned may reach its own parameters
        later: after a warm-up, or an epoch of rest. One dry backward tells, of a copy: no objective sees it.
        Returns: the names of the frozen, and of the unreached that are free.
        """
        dry = copy.deepcopy(self, _copies_of_results(self))
        candidates = {name: parameter for name, parameter in dry.named_parameters() if parameter.requires_grad}
        loss = dry(batch, progress).loss
        gradients = torch.autograd.grad(loss, list(candidates.values()), allow_unused=True)
        unreached = [name for name, gradient in zip(candidates, gradients, strict=True) if gradient is None]
        learned_prefixes = tuple(f"objectives.{name}." for name, objective in self._items() if objective.weight > 0)
        frozen = tuple(name for name in unreached if not name.startswith(learned_prefixes))
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)
        return frozen, tuple(name for name in unreached if name not in frozen)

    def _items(self) -> Iterator[tuple[str, Objective]]:
        for name, objective in self.objectives.items():
            assert isinstance(objective, Objective)
            yield name, objective

    def _scope_of_all_ranks(self, progress: Progress, *words: str) -> AbstractContextManager[None]:
        return random_scope(self.seed, progress.update, *words, device=next(self.encoder.parameters()).device)

    def _encode(self, batch: Batch, shared: dict[int, Features], *, host: bool, key: tuple[int, int, int, int]) -> Encode:
        def encode_anew(views: Views | Tensor, keep: Tensor | None, positions: bool) -> Features:
            with nullcontext() if host else frozen_batch_norm_statistics(self.encoder):
                return self.encoder.encode(views, keep=keep, positions=positions)

        def encode(views: Views | Tensor, *, keep: Tensor | None = None, positions: bool = True) -> Features:
            place = next((place for place, own in enumerate(batch.views) if own is views), None)
            if isinstance(views, Tensor) or place is None or keep is not None or not positions:
                return encode_anew(views, keep, positions)
            features = shared.get(place)
            if features is None or (torch.is_grad_enabled() and not features.summary.requires_grad):
                with random_scope(*key, "family", views.geometry.family, device=views.pixels.device):
                    features = shared[place] = encode_anew(views, None, True)
            return features

        return encode


def _copies_of_results(module: nn.Module) -> dict[int, Tensor]:
    """Return, for `copy.deepcopy`, copies of the tensors held that were computed with gradient, which it refuses.

    `torch.nn.utils.weight_norm` keeps one, the weight, and computes it anew in every forward pass.
    """
    attributes = (value for part in module.modules() for value in vars(part).values())
    return {id(value): value.detach().clone() for value in attributes if isinstance(value, Tensor) and not value.is_leaf}


def _state_of(encoder: Encoder) -> dict[str, tuple[Tensor, bool]]:
    """Return copies of all tensors, and whether each learns."""
    tensors = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    return {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()}


def _refuse_changes(before: dict[str, tuple[Tensor, bool]], after: dict[str, tuple[Tensor, bool]], objective: str) -> None:
    """Raise ValueError that names the first tensor of the encoder that an objective's setup has changed."""
    for name in before | after:
        old, new = before.get(name), after.get(name)
        if old is None or new is None or old[1] != new[1] or not torch.equal(old[0], new[0]):
            raise ValueError(
                f"objective {objective!r} changes the encoder's {name} in its setup: only the first objective, the host, may; name it first"
            )


def united_families(objectives: Sequence[Objective]) -> tuple[ViewFamily, ...]:
    """Return the families of all objectives, each name once: what a loader must deliver.

    Raises: ValueError if two of one name differ.
    """
    families: dict[str, ViewFamily] = {}
    for objective in objectives:
        for family in objective.families:
            if families.setdefault(family.name, family) != family:
                raise ValueError(f"family {family.name!r} of objective {objective.name!r} differs from another of that name; rename one")
    return tuple(families.values())
