"""Everything that a run can be told: one frozen dataclass, whose last two fields are all that does not change results.

Here: the settings, their checks, settings.yaml both ways, what is left of a model's settings where another is taken.
Not here: which settings make a good run (recipes/); views by hand (pipeline/view_recipe.py); the command line (tools/training.py).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.render.choose import check_renderer
from wherefrom.pipeline.shards.labels import LabelRule
from wherefrom.train.encoder import ARCHITECTURE, ModelSettings
from wherefrom.train.objective import OBJECTIVES, Objective, ObjectiveSettings
from wherefrom.train.objectives import SpatialSettings
from wherefrom.train.plain_data import Plain, differences, from_plain, to_plain, unchecked
from wherefrom.train.renames import current
from wherefrom.train.schedule import Shape, cosine, warmed_up

Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
IN_REPORTS = ("update", "full", "labels")  # stand in evaluation.json beside the objectives, under their names
OPTIONS = ("out", "resume", "config", "help")  # of the command line, beside the settings and the objectives
NOT_COMPARED = (
    "runtime",
    "index",
    "evaluation",
    "data",
    "val",
    "needs_data",
)  # with a run to go on with; the loader compares what is in the data


def _at_least(settings: object, smallest: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name}={value}: needs at least {smallest}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimSettings:
    """How weights follow their gradients."""

    name: str = "adamw"  # any optimizer of timm.optim; ssl_lars, and simclr_lars: LARS as the authors of methods with views have it
    lr: float = 1e-3  # at its peak, for the global batch as it is: nothing scales it
    betas: tuple[float, float] = (0.9, 0.95)  # of optimizers that have them
    momentum: float = 0.9  # of optimizers that have it
    weight_decay: float = 0.05  # of matrices; biases, norms, tokens and position tables have none
    final_weight_decay: float | None = None  # after the last update, by a cosine from the first one on; None: it stays
    layer_decay: float | None = None  # of the encoder's learning rate, from each layer to the one before; None: all alike
    warmup_frac: float = 0.04  # of the run, in which the rate rises to its peak
    schedule: Shape = "cosine"
    final_lr: float = 0.0  # at the last update
    clip_norm: float | None = 3.0  # largest gradient norm; None: no clipping
    clip_by: Literal["objective", "parameter"] = (
        "objective"  # norm of each objective's head, the encoder with the host's; or of each tensor
    )

    def __post_init__(self) -> None:
        check_literals(self)
        if not 0 < self.lr < math.inf or not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"lr={self.lr}, final_lr={self.final_lr}: needs lr > 0, finite, and 0 <= final_lr <= lr")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise ValueError(f"betas={self.betas}, momentum={self.momentum}: need 0 <= value < 1")
        if min(self.weight_decay, self.final_weight_decay or 0) < 0:
            raise ValueError(f"weight_decay={self.weight_decay}, final_weight_decay={self.final_weight_decay}: needs at least 0")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay}: needs 0 < layer_decay <= 1, or none")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm}: needs a positive number, or none")
        if not 0 <= self.warmup_frac < 1:
            raise ValueError(f"warmup_frac={self.warmup_frac}: needs 0 <= warmup_frac < 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What is measured, and when; it reads weights and changes none."""

    every: int = 500  # updates between two short evaluations; 0: only at the end, before the full one
    pictures: int = 500  # held-out pictures whose pairs are predicted
    head_pictures: int = 3000  # training pictures that the controls' heads learn from
    head_steps: int = 400
    knn_pictures: int = 3000  # labeled training pictures for k-NN and linear probe; 0: neither
    knn_held_out: int = 5000  # held-out pictures that they are asked about
    view_px: int | None = None  # side of the local views, 0.4 of a picture's, that they see; None: that of the views learned from
    picture_px: int | None = None  # side of the whole pictures that they see, cut to the center; None: that of the views learned from
    short_pictures: int = 200  # held-out pictures of a short evaluation
    short_knn_pictures: int = 500  # labeled training pictures for its k-NN; 0: none

    def __post_init__(self) -> None:
        check_literals(self)
        _at_least(self, 0, "every", "knn_pictures", "short_knn_pictures")
        _at_least(self, 1, "head_steps", "knn_held_out", "view_px", "picture_px")
        _at_least(self, 2, "pictures", "head_pictures", "short_pictures")


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """What is done once with the data before a run; no result depends on it."""

    decode: Literal["auto", "never"] = "auto"  # every picture once, where that saves more: of those known to decode only what shows is

    def __post_init__(self) -> None:
        check_literals(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSettings:
    """What changes speed, place and habit, and results by rounding at most.

    But for `accumulation`, which like the number of ranks splits a batch: where the parts draw random numbers (drop-path, dropout), they
    are another run. Where samples see one another (BatchNorm, negatives) micro-batches belong to the method, and a run does not go on
    with another number; ranks gather them. No view and no record depends on either.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    renderer: str = "auto"  # or one that `wherefrom prove --help` names; a run writes down what served, and goes on with it
    threads: int | None = None  # that read and render; None: one a core of this rank's share
    prefetch: int = 2  # micro-batches ready in advance
    accumulation: int = 1  # micro-batches of one update on every rank
    compile: bool = False
    log_with: Tracker = "tensorboard"  # beside metrics.jsonl; all others than TensorBoard are libraries that you install
    log_every: int = 10  # updates
    checkpoint_every: int = 500  # updates; one more at the end, and when the run is asked to stop
    keep: int = 2  # checkpoints

    def __post_init__(self) -> None:
        check_literals(self)
        check_renderer(self.renderer)
        _at_least(self, 1, "threads", "prefetch", "accumulation", "log_every", "checkpoint_every", "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """A whole run. All but `index` and `runtime` changes results."""

    recipe: str
    needs_data: bool = False  # no run without `data`: the recipe is not meant for the demo's pictures
    data: str | None = None  # shards, e.g. '.../train-{000000..001281}.tar', or a folder of pictures; None: the embedded demo pictures
    val: str | None = None  # held-out shards; None: the demo's where `data` is the demo's, else none, and it says so
    labels: str | None = None  # what labels tar shards: a member such as 'cls', 'json.FIELD', 'tar', 'none'; None: numbers in KEY.cls
    seed: int = 0
    global_batch: int = 16  # samples of one update, over all ranks and micro-batches
    order: Literal["shuffled", "block"] = "shuffled"
    epochs: int = 1
    updates: int | None = None  # instead of epochs; a file or a command line that gives epochs alone takes a recipe's updates away
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; weights and geometry never change theirs
    model: ModelSettings = field(default_factory=ModelSettings)
    # what is learned, by names in OBJECTIVES: the host first, then its plug-ins
    objectives: Mapping[str, ObjectiveSettings] = field(default_factory=lambda: {"spatial": SpatialSettings()})
    optim: OptimSettings = field(default_factory=OptimSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    index: IndexSettings = field(default_factory=IndexSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)

    def __post_init__(self) -> None:
        check_literals(self)
        _at_least(self, 1, "global_batch", "epochs", "updates")
        LabelRule.of(self.labels)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: needs 0 <= seed < 2**64")
        if self.val is not None and self.data is None:
            raise ValueError(f"val={self.val!r} without data: give both, or neither for the embedded demo pictures")
        taken = {each.name for each in fields(TrainSettings)} | {*IN_REPORTS, *OPTIONS}
        for name, settings in self.objectives.items():
            if name in taken or not isinstance(settings, ObjectiveSettings):
                raise ValueError(
                    f"objectives.{name}={settings!r:.60}: needs an objective's settings, with size_px and weight, under a name of its own"
                )
        if not self.objectives:
            raise ValueError(f"objectives: there is nothing to learn; name one of {', '.join(OBJECTIVES)}")

    def make_objectives(self) -> tuple[Objective, ...]:
        """Return what is to be learned, the host first, not yet set up; each has the name and the weight that stand here."""
        objectives = []
        for name, settings in self.objectives.items():
            objective = settings.objective(name)
            objective.weight = settings.weight
            objectives.append(objective)
        return tuple(objectives)

    def with_objectives(self, **changes: ObjectiveSettings | None) -> "TrainSettings":
        """Return the same with some objectives changed in their places, others added behind, and those that are None left out."""
        changed = {**self.objectives, **changes}
        return replace(self, objectives={name: settings for name, settings in changed.items() if settings is not None})

    def coupled_by(self) -> tuple[str, ...]:
        """Return the names of the learned objectives in which samples see one another."""
        return tuple(objective.name for objective in self.make_objectives() if objective.weight > 0 and objective.couples_samples)

    @property
    def view_px(self) -> int:
        """The side of the host's views, as the encoder sees them."""
        return next(iter(self.objectives.values())).size_px

    @property
    def label_view_px(self) -> int:
        """The side of the local views that labels are judged by: as `evaluation` says, else as the host's views."""
        return self.evaluation.view_px or self.view_px

    @property
    def label_picture_px(self) -> int:
        """The side of the whole pictures that labels are judged by: as `evaluation` says, else as the host's views."""
        return self.evaluation.picture_px or self.view_px

    def refuse_without_data(self) -> None:
        """Raise ValueError if the recipe is meant for data and there is none."""
        if self.needs_data and self.data is None:
            raise ValueError(
                f"recipe {self.recipe!r} without data: it is meant for pictures of yours, name shards by --data; the demo draws its own"
            )

    def updates_in_all(self, updates_per_epoch: int) -> int:
        """Return the length of the run."""
        return self.updates or self.epochs * updates_per_epoch

    def passes(self, samples: int) -> float:
        """Return how often the run sees each of so many samples."""
        return self.epochs if self.updates is None else self.updates * self.global_batch / samples

    def learning_rate(self, update: int, updates: int) -> float:
        """Return the learning rate of update `update` of `updates`."""
        optim = self.optim
        warmup = int(optim.warmup_frac * updates)
        return warmed_up(update, updates=updates, peak=optim.lr, warmup=warmup, final=optim.final_lr, shape=optim.schedule)

    def weight_decay(self, update: int, updates: int) -> float:
        """Return the weight decay of update `update` of `updates`."""
        start, end = self.optim.weight_decay, self.optim.final_weight_decay
        return start if end is None else cosine(update, updates=updates, start=start, end=end)


def write_settings(path: Path, settings: TrainSettings) -> None:
    """Write settings.yaml, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(yaml.safe_dump(to_plain(settings), sort_keys=False), encoding="utf-8")


def read_plain_settings(path: Path) -> dict[str, object]:
    """Return what a settings file says, unchecked, under today's names; `from_plain` checks it.

    Raises: ValueError in one line if it is no YAML of named fields; OSError in one line if it cannot be read.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise OSError(f"{path}: no settings file ({problem.strerror}); name one, such as RUN/settings.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path}: no settings file, {' '.join(str(problem).split())}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: holds {type(plain).__name__}, expected named settings as in a run's settings.yaml")
    try:
        return current(plain)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def read_settings(path: Path, base: TrainSettings) -> TrainSettings:
    """Return `base` with what a settings file says; where it names another model, without what `base` changes of its own.

    Raises: as `read_plain_settings` and `from_plain`, naming the file.
    """
    return settled(overlaid(path, base), source=path)


def overlaid(path: Path, base: TrainSettings) -> TrainSettings:
    """Return what `read_settings` does, unchecked: a stage on the way, for `settled`.

    Raises: ValueError that names file and field, for unknown names and wrong types; as `read_plain_settings`.
    """
    plain = read_plain_settings(path)
    try:
        stage = from_plain(unchecked(base), _with_listed_objectives(plain, base))
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
    named = plain.get("model")
    stage = with_its_own_length(stage, given=plain)
    return with_its_own_model(stage, base, given=named if isinstance(named, dict) else ())


def _with_listed_objectives(plain: Mapping[str, Plain], base: TrainSettings) -> dict[str, Plain]:
    """Return what a settings file says, with all objectives in their list: those of `base`, unless the file has a list of its own.

    An objective that stands beside the list changes one of them, or comes behind; null leaves it out.
    Raises: ValueError if one stands both in the list and beside it.
    """
    own = {each.name for each in fields(TrainSettings)}
    beside = {name: held for name, held in plain.items() if name not in own and name in OBJECTIVES}
    listed = plain.get("objectives", {name: {} for name in base.objectives})
    if not beside or not isinstance(listed, Mapping):
        return dict(plain)
    for name in beside:
        if "objectives" in plain and name in listed:
            raise ValueError(f"{name}: stands in objectives, too; leave one of them out")
    changed = {name: held for name, held in {**listed, **beside}.items() if held is not None}
    return {name: held for name, held in plain.items() if name not in beside} | {"objectives": changed}


def with_its_own_length(stage: TrainSettings, *, given: Collection[str]) -> TrainSettings:
    """Return `stage`, unchecked; where epochs are given and updates are not, without the updates that it is from."""
    return replace(stage, updates=None) if "epochs" in given and "updates" not in given else stage


def with_its_own_model(stage: TrainSettings, base: TrainSettings, *, given: Collection[str]) -> TrainSettings:
    """Return `stage`, unchecked; where its model is another than that of `base`, without what `base` changes of its own.

    A width, a depth, a patch, weights are one model's; positions and frozen parts go with ViTs. What is `given` beside the name stays; a
    ViT's position table is made for the host's views.
    """
    model = stage.model
    if model.name == base.model.name:
        return stage
    own: dict[str, Any] = dict.fromkeys(ARCHITECTURE)
    own["weights"] = None
    if not model.is_vit:
        own |= {"positions": "learned", "resampling": "antialiased", "frozen": ()}
    own["view_size_px"] = stage.view_px if stage.objectives and model.is_vit else None
    return replace(stage, model=replace(model, **{name: value for name, value in own.items() if name not in given}))


def settled(stage: TrainSettings, *, source: Path | str | None = None) -> TrainSettings:
    """Return settings that were put together unchecked, checked; `source` is where they come from, if not from Python.

    Raises: ValueError in one line that names the source and the field.
    """
    plain = {field.name: to_plain(getattr(stage, field.name)) for field in fields(TrainSettings)}
    try:
        return from_plain(TrainSettings(recipe=stage.recipe), plain)
    except ValueError as problem:
        raise ValueError(f"{source}: {problem}" if source is not None else str(problem)) from None


def check_same_run(settings: TrainSettings, saved: Plain) -> None:
    """Refuse settings that would not go on with the run whose settings were saved; only `runtime`, `index` and the data's place may differ.

    Of `runtime` the number of micro-batches may not, where samples of one see one another.
    Raises: ValueError that names the first setting that differs.
    """
    ours, theirs = (_compared(plain) for plain in (to_plain(settings), saved))
    for where, here, there in differences(ours, theirs):
        raise ValueError(f"{where}={here!r}: the run to go on with has {there!r}; take its value, or another --out")
    here, there = settings.runtime.accumulation, saved.get("runtime", {}).get("accumulation", settings.runtime.accumulation)
    coupled = (*settings.coupled_by(), *([settings.model.name] if settings.model.has_batch_norm else []))
    if here != there and coupled:
        raise ValueError(
            f"runtime.accumulation={here}: the run to go on with has {there}, and in {', '.join(map(repr, coupled))} the samples of a "
            "micro-batch see one another; take its value, or another --out"
        )


def _compared(plain: Plain) -> dict[str, Plain]:
    """Return what belongs to a run, objectives by their names as the command line has them, and in which order they stand."""
    objectives = plain.get("objectives", {})
    rest = {name: value for name, value in plain.items() if name not in NOT_COMPARED}
    return rest | {"objectives": list(objectives)} | objectives
