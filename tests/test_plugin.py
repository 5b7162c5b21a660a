"""A plug-in leaves its host alone: runs with and without one are compared bit for bit, on a ViT with drop-path and on BatchNorm.

Two toys hold the interface open: one learns from an EMA teacher, one from masked views. Each promise has a control in which it breaks.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.view_recipe import ViewFamily
from wherefrom.pipeline.views import Batch, Photometric, ViewGeometry, Views
from wherefrom.train import objective as objective_module
from wherefrom.train.encoder import Encoder, Features, ModelSettings
from wherefrom.train.objective import Encode, Objective, Progress, Step, Terms, random_scope

pytestmark = pytest.mark.core

VIT = ModelSettings(view_size_px=32, patch_size_px=8, width=32, depth=2, heads=2, drop_path=0.5)
RESNET = ModelSettings(name="resnet10t")
FIXED = replace(VIT, positions="sincos", frozen=("patch_embed",))  # as MAE and MoCo v3 have them
SAMPLES, SIZE = 4, (32, 32)


def at(update: int) -> Progress:
    """Return the progress of one of 100 updates, 10 an epoch."""
    return Progress(update=update, updates=100, updates_per_epoch=10)


def family(name: str) -> ViewFamily:
    return ViewFamily(name=name, views=2, size_px=SIZE, law=Independent())


class TeacherObjective(Objective):
    """Say what a slowly moving copy of the encoder says about the same views; dropout in the head draws random numbers."""

    def __init__(self, name: str = "teacher", weight: float = 1.0, *, views: str | None = None, stopped: bool = False) -> None:
        super().__init__()
        self.name, self.weight, self.stopped = name, weight, stopped
        self.families = (family(views or name),)

    def setup(self, encoder: Encoder) -> None:
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(encoder.width, encoder.width))

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        views = batch.family(self.families[0].name)
        features = encode(views)
        predicted = self.head(features.detach().summary if self.stopped else features.summary)
        with torch.no_grad():
            teacher_summary = self.teacher.encode(views).summary
        loss = 1 - F.cosine_similarity(predicted, teacher_summary, dim=-1).mean()
        return Terms(losses={"likeness": loss}, meters={"norm": predicted.norm(dim=-1).mean()})

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        for slow, fast in zip(self.teacher.parameters(), encoder.parameters(), strict=True):
            slow.lerp_(fast, 0.5)


class MaskedObjective(Objective):
    """Tell the mean color of a view from a random half of its tokens, without their places."""

    def __init__(self, name: str = "masked", weight: float = 1.0) -> None:
        super().__init__()
        self.name, self.weight = name, weight
        self.families = (family(name),)

    def setup(self, encoder: Encoder) -> None:
        self.head = nn.Linear(encoder.width, 3)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        views = batch.family(self.name)
        keep = torch.rand(*views.pixels.shape[:2], 16).argsort(-1)[..., :8]
        mean_token = encode(views, keep=keep, positions=False).tokens.mean(-2)
        return Terms(losses={"color": (self.head(mean_token) - views.pixels.mean((-2, -1))).square().sum(-1).mean()})


def batch_of(*names: str, update: int = 0) -> Batch:
    sample = torch.arange(SAMPLES)
    hw = torch.full((SAMPLES, 2), 64, dtype=torch.int32)
    views = []
    for name in names:
        generator = torch.Generator().manual_seed(update * 100 + len(name))
        record = ViewGeometry(
            boxes=torch.tensor([0.0, 0, 32, 32]).expand(SAMPLES, 2, 4),
            flipped=torch.zeros(SAMPLES, 2, dtype=torch.bool),
            quarter_turns=torch.zeros(SAMPLES, 2, dtype=torch.long),
            source_size=hw,
            stored_orientation=torch.ones(SAMPLES, dtype=torch.uint8),
            sample=sample,
            drawn_for=sample,
            view=torch.arange(2),
            family=name,
            size_px=SIZE,
            seed=0,
            epoch=0,
        )
        pixels = torch.randn(SAMPLES, 2, 3, *SIZE, generator=generator)
        valid = torch.ones(SAMPLES, 2, dtype=torch.bool)
        views.append(Views(pixels=pixels, geometry=record, valid=valid, photometric=Photometric.unchanged(SAMPLES, 2)))
    return Batch(sample=sample, drawn_for=sample, label=torch.full((SAMPLES,), -1), source_size=hw, views=tuple(views))


def trained(
    settings: ModelSettings, objectives: Sequence[Objective], *, together: bool = False, steps: int = 3
) -> tuple[Step, list[Tensor]]:
    """Train for some steps with clipped gradients; return the step and the host's losses."""
    with random_scope(0, "encoder"):
        encoder = Encoder(settings)
    step = Step(encoder, objectives, seed=0).train()
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for update in range(steps):
        out = step(batch_of(*(family.name for family in step.families), update=update), at(update))
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        groups = list(step.clip_groups().values())
        for group in [list(itertools.chain(*groups))] if together else groups:
            nn.utils.clip_grad_norm_(group, 1e-3)
        optimizer.step()
        step.after_step(at(update), out.seen)
        losses.append(next(iter(out.losses.values())))
    return step, losses


def host_differs(with_plugin: tuple[Step, list[Tensor]], alone: tuple[Step, list[Tensor]]) -> bool:
    """Whether anything that the host owns, or its loss, differs in a single bit."""
    ours, theirs = with_plugin[0].state_dict(), alone[0].state_dict()
    return with_plugin[1] != alone[1] or any(not torch.equal(ours[name], theirs[name]) for name in theirs)


@contextmanager
def nothing(*_: object, **__: object) -> Iterator[None]:
    yield


@pytest.mark.parametrize("settings", [VIT, FIXED, RESNET], ids=["drop-path", "fixed", "BatchNorm"])
def test_a_plugin_of_weight_0_is_absent_bit_for_bit(settings: ModelSettings) -> None:
    alone = trained(settings, [TeacherObjective("host")])
    plugins = [TeacherObjective(weight=0.0)] + ([] if settings is RESNET else [MaskedObjective(weight=0.0)])
    accompanied = trained(settings, [TeacherObjective("host"), *plugins])
    assert not host_differs(accompanied, alone)
    assert host_differs(trained(settings, [TeacherObjective("host"), TeacherObjective(weight=1.0)]), alone)


def test_without_random_scopes_a_plugin_of_weight_0_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_module, "random_scope", nothing)

    def run(*plugins: Objective) -> tuple[Step, list[Tensor]]:
        torch.manual_seed(0)
        return trained(VIT, [TeacherObjective("host"), *plugins])

    assert not host_differs(run(), run())
    assert host_differs(run(MaskedObjective(weight=0.0)), run())


def test_with_remembered_statistics_a_plugin_of_weight_0_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = trained(RESNET, [TeacherObjective("host")])
    monkeypatch.setattr(objective_module, "frozen_batch_norm_statistics", nothing)
    assert host_differs(trained(RESNET, [TeacherObjective("host"), TeacherObjective(weight=0.0)]), alone)


@pytest.mark.parametrize("settings", [VIT, RESNET], ids=["drop-path", "BatchNorm"])
def test_a_plugin_whose_gradient_is_stopped_leaves_the_host_bit_identical(settings: ModelSettings) -> None:
    alone = trained(settings, [TeacherObjective("host")])
    plugin = TeacherObjective(stopped=True)
    accompanied = trained(settings, [TeacherObjective("host"), plugin])
    assert not host_differs(accompanied, alone)
    assert plugin.head[1].weight.grad is not None
    one_norm_for_all = trained(settings, [TeacherObjective("host"), TeacherObjective(stopped=True)], together=True)
    assert host_differs(one_norm_for_all, alone)


def test_a_plugin_on_the_hosts_own_views_shares_their_encoding() -> None:
    calls = []
    host, plugin = TeacherObjective("host"), TeacherObjective(views="host", stopped=True)
    step = Step(Encoder(VIT), [host, plugin], seed=0)
    step.encoder.register_forward_hook(lambda *_: calls.append(1))
    step(batch_of("host"), at(0))
    assert len(calls) == 1
    assert [family.name for family in step.families] == ["host"]

    alone = trained(VIT, [TeacherObjective("host")])
    assert not host_differs(trained(VIT, [TeacherObjective("host"), TeacherObjective(views="host", stopped=True)]), alone)
    assert not host_differs(trained(VIT, [TeacherObjective("host"), TeacherObjective(views="host", weight=0.0)]), alone)


def test_an_encoding_without_gradient_is_never_handed_to_one_who_learns() -> None:
    silent, learner = TeacherObjective("silent", 0.0, views="both"), TeacherObjective("learner", views="both")
    step = Step(Encoder(VIT), [silent, learner], seed=0)
    step(batch_of("both"), at(0)).loss.backward()
    assert all(parameter.grad is not None for parameter in step.encoder.parameters())


def test_draws_depend_on_update_rank_and_micro_batch_and_on_nothing_before() -> None:
    step = Step(Encoder(VIT), [TeacherObjective("host")], seed=0).train()
    batch = batch_of("host")

    def loss(update: int, **place: int) -> float:
        return float(step(batch, at(update), **place).loss.detach())

    first = loss(update=5)
    torch.manual_seed(99)
    assert loss(update=5) == first
    assert len({first, loss(update=6), loss(update=5, rank=1), loss(update=5, micro=1)}) == 4


def test_a_random_scope_gives_back_the_generator_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with random_scope(0, "a"):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    with random_scope(0, "b"):
        assert not torch.equal(torch.rand(4), inside)
    with random_scope(0, "a"):
        assert torch.equal(torch.rand(4), inside)


def test_the_teacher_follows_the_encoder_without_gradient_and_without_the_head() -> None:
    plugin = TeacherObjective()
    step, _ = trained(VIT, [TeacherObjective("host"), plugin], steps=1)
    assert all(parameter.grad is None for parameter in plugin.teacher.parameters())
    assert {name.split(".")[0] for name, _ in plugin.teacher.named_parameters()} == {"model"}
    slow, fast = (next(module.model.blocks.parameters()) for module in (plugin.teacher, step.encoder))
    with random_scope(0, "encoder"):
        start = next(Encoder(VIT).model.blocks.parameters())
    torch.testing.assert_close(slow, (start + fast) / 2)
    assert not torch.equal(start, fast)


class Late(MaskedObjective):
    """Rest before update 1, own a layer that nothing ever reaches, and keep the size of every batch."""

    def setup(self, encoder: Encoder) -> None:
        super().setup(encoder)
        self.spare = nn.Linear(2, 2)
        self.register_buffer("center", torch.zeros(3))
        self.batch_sizes: list[int] = []
        self.awake = False

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        terms = super().forward(batch, encode, progress)
        self.batch_sizes.append(len(batch.sample))
        self.center += 1
        return terms if self.awake else Terms(losses={"color": terms.losses["color"].detach() * 0})

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        self.awake = True


def test_encoder_parameters_that_nobody_reaches_are_named_and_frozen_and_nothing_else_changes() -> None:
    step = Step(Encoder(VIT), [MaskedObjective("masked"), TeacherObjective(weight=0.0), Late("late")], seed=0)
    before = {name: value.clone() for name, value in step.state_dict().items()}
    generator = torch.get_rng_state()
    frozen, waiting = step.freeze_unreached(batch_of("masked", "teacher", "late"), at(0))
    head = {f"objectives.teacher.head.1.{name}" for name in ("weight", "bias")}
    assert set(frozen) == head | {"encoder.model.pos_embed"}
    assert set(waiting) == {f"objectives.late.{layer}.{name}" for layer in ("head", "spare") for name in ("weight", "bias")}
    still = {name for name, parameter in step.named_parameters() if not parameter.requires_grad and "teacher.teacher" not in name}
    assert still == set(frozen)
    assert all(torch.equal(before[name], value) for name, value in step.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in step.parameters())
    late = step.objectives["late"]
    assert isinstance(late, Late)
    assert late.batch_sizes == []  # the dry pass was not its business


def test_a_head_that_holds_a_computed_weight_is_tried_on_a_copy_too() -> None:
    class Normed(MaskedObjective):
        def setup(self, encoder: Encoder) -> None:
            self.head = weight_norm(nn.Linear(encoder.width, 3))  # the usual last layer of DINO; its weight is a result, no parameter

    step = Step(Encoder(VIT), [Normed("masked")], seed=0)
    weight = step.objectives["masked"].head.weight
    with pytest.raises(RuntimeError, match="deepcopy"):  # why a plain copy does not do
        copy.deepcopy(step)
    assert step.freeze_unreached(batch_of("masked"), at(0)) == (("encoder.model.pos_embed",), ())
    assert step.objectives["masked"].head.weight is weight


def test_what_is_reached_late_learns_from_then_on() -> None:
    late = Late("late")
    with random_scope(0, "encoder"):
        step = Step(Encoder(VIT), [MaskedObjective("masked"), late], seed=0).train()
    step.freeze_unreached(batch_of("masked", "late"), at(0))
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    weights = []
    for update in range(3):
        step(batch_of("masked", "late", update=update), at(update)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.after_step(at(update))
        weights.append((late.head.weight.detach().clone(), late.spare.weight.detach().clone()))
    (head_0, spare_0), (head_1, _), (head_2, spare_2) = weights
    assert not torch.equal(head_0, head_1)
    assert not torch.equal(head_1, head_2)
    assert torch.equal(spare_0, spare_2)  # nor does what is never reached decay


@pytest.mark.parametrize("change", ["values", "learning", "parts"])
def test_a_plugin_whose_setup_changes_the_encoder_is_refused_by_name_and_a_host_is_not(change: str) -> None:
    class Changes(MaskedObjective):
        def setup(self, encoder: Encoder) -> None:
            super().setup(encoder)
            table = encoder.model.pos_embed
            if change == "values":
                table.data[0, 0, 0] += 1
            elif change == "learning":
                table.requires_grad_(False)
            else:
                encoder.model.pos_embed_2 = nn.Parameter(torch.zeros(1))

    with pytest.raises(ValueError, match=r"'changes' changes the encoder's model\.pos_embed.* only the first objective, the host, may"):
        Step(Encoder(VIT), [TeacherObjective("host"), Changes("changes", weight=0.0)], seed=0)
    Step(Encoder(VIT), [Changes("changes"), TeacherObjective("plugin", weight=0.0)], seed=0)


def test_a_dry_backward_leaves_batch_statistics_alone() -> None:
    step = Step(Encoder(RESNET), [TeacherObjective("host")], seed=0).train()
    before = {name: value.clone() for name, value in step.encoder.state_dict().items()}
    assert step.freeze_unreached(batch_of("host"), at(0)) == ((), ())
    assert all(torch.equal(before[name], value) for name, value in step.encoder.state_dict().items())


def test_views_that_an_objective_made_itself_are_encoded_for_it_alone() -> None:
    class Halves(MaskedObjective):
        def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
            views = batch.family(self.name)
            whole, half = encode(views), encode(views[:, 0])
            assert isinstance(half, Features)
            assert torch.equal(encode(views.pixels[:, :1]).summary, half.summary)  # pixels alone serve as well
            assert half.summary.shape[1] == 1
            return Terms(losses={"spread": (whole.summary[:, :1] - half.summary).square().mean()})

    step = Step(Encoder(VIT), [Halves()], seed=0).eval()
    assert float(step(batch_of("masked"), at(0)).loss.detach()) < 1e-9


def test_messages_name_the_thing_and_the_mend() -> None:
    for names, message in ((["a", "a"], "identifier of its own"), (["a.b"], "identifier of its own"), ([], "at least one")):
        with pytest.raises(ValueError, match=message):
            Step(Encoder(VIT), [MaskedObjective(name) for name in names], seed=0)
    with pytest.raises(ValueError, match="one must be positive"):
        Step(Encoder(VIT), [MaskedObjective(weight=0.0)], seed=0)
    other = MaskedObjective("other")
    other.families = (ViewFamily(name="masked", views=3, size_px=SIZE),)
    with pytest.raises(ValueError, match="differs from another of that name; rename one"):
        Step(Encoder(VIT), [MaskedObjective(), other], seed=0)
