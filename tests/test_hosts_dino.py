"""DINO against figures that its authors' code gave on the same inputs, float64; tests/data/hosts/dino.json names the commit.

Compared against: those figures, and the nearest slips, which the same tolerances tell apart.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from host_formulas import figures, gap, parameter, picture, tensor, wave
from host_steps import assert_grads, batch_of, fill
from host_vit import tiny_vit
from torch import Tensor, nn

from wherefrom.pipeline import Independent, ShardIndex, ViewFamily
from wherefrom.train import (
    DINO,
    DINOSettings,
    Encoder,
    ModelSettings,
    OptimSettings,
    ParameterRule,
    Progress,
    RuntimeSettings,
    Step,
    Trainer,
    TrainSettings,
    recipe,
)
from wherefrom.train.loop import accelerator_for
from wherefrom.train.objectives.dino import DINOHead, dino_loss
from wherefrom.train.optimizer import clip_gradients, drop_resting, gated_step, make_optimizer, set_rates
from wherefrom.train.schedule import cosine

pytestmark = pytest.mark.core

FIGURES = figures("dino")


def view_major(array: Any, views: int) -> Tensor:
    """Return rows (V * B, K) as (B, V, K)."""
    return tensor(array).unflatten(0, (views, -1)).transpose(0, 1)


@pytest.mark.parametrize("case", ["multicrop", "two_views", "after_warmup"])
def test_loss_gradient_center_and_temperature_are_the_authors(case: str) -> None:
    figure = FIGURES["loss"][case]
    told = figure["args"]
    b, k, views = told["B"], told["K"], told["ncrops"]
    settings = DINOSettings(
        teacher_temperature=told["teacher_temp"],
        first_teacher_temperature=told["warmup_teacher_temp"],
        teacher_temperature_epochs=told["warmup_teacher_temp_epochs"],
    )
    temperature = settings.teacher_temperature_in(told["epoch"])
    assert temperature == pytest.approx(figure["teacher_temp"], abs=1e-12)
    student = view_major(wave((views * b, k), 1), views).requires_grad_()
    teacher, center = view_major(wave((2 * b, k), 2), 2), tensor(wave((1, k), 3, 0.1))
    loss = dino_loss(student, ((teacher - center) / temperature).softmax(-1), temperature=0.1)
    loss.backward()
    assert gap(loss, figure["loss"]) < 1e-12
    assert student.grad is not None
    assert gap(student.grad.transpose(0, 1).flatten(0, 1), figure["grad_student"]) < 1e-12
    assert gap(center.lerp(teacher.mean((0, 1)), 0.1), figure["center_after"]) < 1e-12
    slip = dino_loss(student, (teacher / temperature).softmax(-1), temperature=0.1)  # not centered
    assert gap(slip, figure["loss"]) > 1e-3


def test_the_loss_is_computed_in_full_precision_under_autocast() -> None:
    student, targets = tensor(wave((4, 3, 16), 1)).float(), tensor(wave((4, 2, 16), 2)).float().softmax(-1)
    full = dino_loss(student, targets, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dino_loss(student, targets, temperature=0.1), full)


def test_the_loss_in_float32_is_that_in_float64_at_many_prototypes() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(256, views, 4096, generator=generator) for views in (4, 2))
    targets = (teacher / 0.04).softmax(-1)
    exact = dino_loss(student.double(), targets.double(), temperature=0.1)
    assert float(dino_loss(student, targets, temperature=0.1)) == pytest.approx(float(exact), abs=1e-5)
    # one sum over samples and prototypes rounds far more
    log_shares = (student / 0.1).log_softmax(-1)
    pairs = -torch.einsum("bgk,bvk->gv", targets, log_shares) / len(student)
    assert abs(float(pairs[~torch.eye(2, 4, dtype=torch.bool)].mean()) - float(exact)) > 5e-5


def test_teacher_temperature_rises_by_epochs() -> None:
    settings = DINOSettings(teacher_temperature=0.07, teacher_temperature_epochs=3)
    assert [settings.teacher_temperature_in(epoch) for epoch in range(10)] == pytest.approx(FIGURES["teacher_temp_schedule"]["values"])


def test_momentum_and_weight_decay_go_as_the_authors() -> None:
    schedules = FIGURES["schedules"]
    for (start, end), name in (((0.996, 1.0), "momentum"), ((0.04, 0.4), "weight_decay")):
        assert [cosine(it, updates=70, start=start, end=end) for it in schedules["its"]] == pytest.approx(schedules[name], abs=1e-14)


@pytest.mark.parametrize("norm", [False, True])
def test_head_is_the_authors(norm: bool) -> None:
    figure = FIGURES["head_bn" if norm else "head"]
    head = DINOHead(12, DINOSettings(prototypes=16, hidden=20, bottleneck=8, head_batch_norm=norm)).double()
    shapes = {theirs_of(name): list(own.shape) for name, own in head.named_parameters()}
    expected = {name: shape for name, shape in figure["shapes"].items() if figure["requires_grad"][name]}
    assert shapes == expected
    fill(head, theirs_of)
    x = tensor(wave((6, 12), 11)).requires_grad_()
    out = head(x)
    assert gap(out, figure["out"]) < 1e-12
    (out * tensor(wave((6, 16), 12))).sum().backward()
    assert gap(x.grad, figure["grad_x"]) < 1e-10
    assert_grads(head, theirs_of, figure["grads"])


def test_head_starts_as_the_authors() -> None:
    head = DINOHead(384, DINOSettings(prototypes=4096))
    linears = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert [layer.weight.std().item() for layer in linears] == pytest.approx([0.02] * 3, rel=0.02)
    assert all(not layer.bias.any() for layer in linears)
    v = head.prototypes.weight_v
    assert v.std().item() == pytest.approx(256**-0.5 / 3**0.5, rel=0.02)
    assert v.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)


def test_positions_of_local_views_are_resampled_as_the_authors() -> None:
    def encoded(**changes: Any) -> Tensor:
        encoder = Encoder(
            ModelSettings(name="vit_small_patch16_224", view_size_px=32, patch_size_px=8, width=8, depth=1, heads=1, **changes)
        )
        encoder.double()
        with torch.no_grad():
            encoder.model.pos_embed.copy_(tensor(parameter("pos_embed", (1, 17, 8))))
            encoder.model.cls_token.zero_()
        return encoder._with_positions(encoder.model, torch.zeros(1, 3, 3, 8, dtype=torch.float64))

    assert gap(encoded(resampling="plain"), FIGURES["pos_interpolation"]["out"]) < 1e-12
    assert gap(encoded(), FIGURES["pos_interpolation"]["out"]) > 0.1


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    figure = FIGURES["clip"]

    def clipped(each: bool) -> list[Tensor]:
        weight, bias = (nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in ((4, 5), (4,)))
        weight.grad, bias.grad = tensor(wave((4, 5), 21, 3.0)), tensor(wave((4,), 22, 0.3))
        norm = clip_gradients({"all": [weight, bias, nn.Parameter(torch.zeros(2))]}, 3.0, each=each)["all"]
        assert norm.item() == pytest.approx(torch.tensor(figure["norms"]).norm().item())
        return [weight.grad, bias.grad]

    weight, bias = clipped(each=True)
    assert gap(weight, figure["weight"]) < 1e-12
    assert gap(bias, figure["bias"]) < 1e-12
    assert gap(clipped(each=False)[1], figure["bias"]) > 0.1


class OfDINO(NamedTuple):
    """What a run of a few updates leaves after each."""

    update: int
    loss: float
    step: Step
    dino: DINO
    optimizer: torch.optim.Optimizer


def run_of(case: str, *, each: bool = True, rests: bool = True, resampling: str = "plain", **changes: Any) -> Iterator[OfDINO]:
    """Make the six updates, three epochs of two, of a case, as a trainer makes them, with the authors' weights at first."""
    settings = DINOSettings(
        **{
            "prototypes": 24,
            "hidden": 20,
            "bottleneck": 8,
            "local_views": 2,
            "size_px": 16,
            "local_px": 8 if "8px" in case else 16,
            "teacher_temperature": 0.07,
            "teacher_temperature_epochs": 2,
            "teacher_momentum": 0.9,
            "free_prototype_norms": "free" in case,
            **changes,
        }
    )
    figure, dino = FIGURES["end_to_end"][case], DINO(settings)
    student = tiny_vit(resampling=resampling)
    fill(student, theirs_of)
    step = Step(student, [dino], seed=0).double()
    fill(dino.head, lambda name: f"head.{theirs_of(name)}")
    dino.teacher_head.load_state_dict(dino.head.state_dict())
    optimizer = make_optimizer(step, OptimSettings(betas=(0.9, 0.999)), step.parameter_rules())
    for update in range(6):
        progress = Progress(update=update, updates=6, updates_per_epoch=2)
        output = step(batch_of(*views_of(update, settings)), progress)
        output.loss.backward()
        if rests:
            drop_resting(optimizer, progress.epoch)
        step.before_update(progress)
        clip_gradients(step.clip_groups(), 0.3, each=each)
        set_rates(optimizer, lr=figure["lr"][update], peak_lr=1.0, weight_decay=figure["weight_decay"][update])
        gated_step(optimizer, torch.tensor(True))
        optimizer.zero_grad()
        step.after_step(progress, output.seen)
        yield OfDINO(update, output.loss.item(), step, dino, optimizer)


def views_of(update: int, settings: DINOSettings) -> tuple[tuple[str, Tensor], ...]:
    def views(*numbers: int, px: int = 16) -> Tensor:
        return torch.stack([tensor(picture((4, 3, px, px), number, update)) for number in numbers], 1)

    return ("dino_1", views(0)), ("dino_2", views(1)), ("dino_local", views(2, 3, px=settings.local_px))


def theirs_of(name: str) -> str:
    """Return how the authors call a parameter of the encoder, or of the head."""
    return name.replace("prototypes.", "last_layer.").replace("model.", "backbone.", 1)


def furthest(case: str, **slips: Any) -> float:
    """Return how far losses, centers, students and teachers of a run are from the figures."""
    figure, gaps = FIGURES["end_to_end"][case], []
    for after in run_of(case, **slips):
        gaps.append(gap(after.loss, figure["losses"][after.update]))
        snapshot = figure["snapshots"].get(f"after_update_{after.update}")
        if snapshot is None:
            continue
        dino = after.dino
        gaps.append(gap(dino.center[None], snapshot["center"]))
        for who, body, head in (("student", after.step.encoder, dino.head), ("teacher", dino.teacher, dino.teacher_head)):
            ours = {theirs_of(name): own for name, own in body.named_parameters()}
            ours |= {f"head.{theirs_of(name)}": own for name, own in head.named_parameters()}
            assert snapshot[who].keys() - ours.keys() <= {"head.last_layer.weight_g"}
            gaps += [gap(ours[name], theirs) for name, theirs in snapshot[who].items() if name in ours]
    return max(gaps)


@pytest.mark.parametrize("case", ["locals_16px_norm_last_layer", "locals_16px_free_last_layer", "locals_8px_norm_last_layer"])
def test_student_teacher_and_center_go_as_the_authors(case: str) -> None:
    assert furthest(case) < 1e-6


def test_the_nearest_slips_go_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    case = "locals_8px_norm_last_layer"
    slips: list[dict[str, Any]] = [
        {"each": False},  # clipped by one norm of all
        {"rests": False},  # prototypes learn in the first epoch
        {"resampling": "antialiased"},
        {"teacher_temperature_epochs": 3},
        {"teacher_momentum": 0.91},
        {"center_momentum": 0.91},
        {"student_temperature": 0.11},
    ]
    assert {str(slip): furthest(case, **slip) for slip in slips if not furthest(case, **slip) > 1e-3} == {}
    monkeypatch.setattr(DINO, "rule_for", lambda self, name, parameter: ParameterRule(rest_epochs=1.0 if "prototypes" in name else 0.0))
    assert furthest(case) > 1e-5  # tokens and positions do not decay


def test_resting_prototypes_are_skipped_by_the_optimizer_wholly() -> None:
    starts: Tensor | None = None
    for update, _, _, dino, optimizer in run_of("locals_16px_norm_last_layer"):
        v = dino.head.prototypes.weight_v
        starts = v.detach().clone() if starts is None else starts
        assert (not optimizer.state[v]) == (update < 2)  # neither moments nor decay
        assert torch.equal(v, starts) == (update < 2)


def test_what_decays_is_what_the_authors_let_decay() -> None:
    after = next(run_of("locals_16px_norm_last_layer"))
    decays = {name for name, rule in after.step.parameter_rules().items() if rule.decays}
    names = {theirs_of(name.replace("encoder.", "").replace("objectives.dino.", "")) for name in decays}
    groups = FIGURES["adamw_groups"]
    assert {name for name in names if "blocks" not in name} == set(groups["regularized_outside_blocks"])
    assert {name for name in names if "blocks.0." in name} == set(groups["regularized_block0"])


def settings_of(shards: Path, **changes: Any) -> TrainSettings:
    """Return the settings of a run of a second: two epochs of three updates."""
    small = DINOSettings(size_px=24, local_px=12, local_views=3, prototypes=32, hidden=16, bottleneck=8)
    settings = TrainSettings(
        recipe="demo",
        data=str(shards / "train.tar"),
        global_batch=8,
        updates=8,
        model=ModelSettings(view_size_px=24, patch_size_px=12, width=32, depth=2, heads=2, drop_path=0.1, resampling="plain"),
        objectives={"dino": small},
        optim=OptimSettings(weight_decay=0.04, final_weight_decay=0.4, clip_by="parameter", warmup_frac=0.2),
        runtime=RuntimeSettings(device="cpu", renderer="torch", threads=1, log_with="none"),
    )
    return replace(settings, **changes)


@contextlib.contextmanager
def trainer_of(settings: TrainSettings) -> Iterator[tuple[Trainer, DINO]]:
    assert settings.data is not None
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(settings, ShardIndex.open(settings.data), accelerator_for(settings))
    with contextlib.closing(trainer):
        dino = trainer.step.objectives["dino"]
        assert isinstance(dino, DINO)
        yield trainer, dino


def test_in_a_run_prototypes_rest_for_an_epoch_and_the_teacher_is_what_is_written(tiny_shards: Path) -> None:
    with trainer_of(settings_of(tiny_shards)) as (trainer, dino):
        start, rested = dino.head.prototypes.weight_v.detach().clone(), []
        for _ in range(trainer.loader.updates_per_epoch + 1):
            trainer.update()
            rested.append(torch.equal(dino.head.prototypes.weight_v, start))
        row = trainer.window.take()
        assert rested == [True] * trainer.loader.updates_per_epoch + [False]
        assert trainer.step.exported() is dino.teacher
        assert not any(p.requires_grad for part in (dino.teacher, dino.teacher_head) for p in part.parameters())
        assert dino.center.any()
        assert 0 < row["meter:dino/teacher_entropy"] < math.log(32)
        assert row["meter:dino/feature_rank"] >= 1 and 0 < row["meter:dino/feature_std"] < 1.5


def test_micro_batches_change_neither_loss_nor_center(tiny_shards: Path) -> None:
    """Without drop-path, whose masks are keyed by micro-batch."""
    results = []
    for accumulation in (1, 2):
        settings = settings_of(tiny_shards, updates=3)
        model, runtime = replace(settings.model, drop_path=0.0), replace(settings.runtime, accumulation=accumulation)
        with trainer_of(replace(settings, model=model, runtime=runtime)) as (trainer, dino):
            for _ in range(3):
                trainer.update()
            results.append((trainer.window.take()["loss"], dino.center.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


WRONG = {
    "local_views=-1: needs at least 0": {"local_views": -1},
    "teacher_temperature=0: needs a positive number": {"teacher_temperature": 0},
    "center_momentum=1.1: needs 0 to 1": {"center_momentum": 1.1},
    "prototypes=0: needs at least 1": {"prototypes": 0},
    "local_area_frac=(0.5, 0.4): needs 0 < low <= high <= 1": {"local_area_frac": (0.5, 0.4)},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_cannot_be_are_refused_in_one_line(message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        DINOSettings(**WRONG[message])


def test_views_that_patches_do_not_divide_are_refused_before_the_first_update(tiny_shards: Path) -> None:
    objectives = {"dino": replace(settings_of(tiny_shards).objectives["dino"], local_px=16)}
    with (
        pytest.raises(ValueError, match=r"^views are \(16, 16\) px, patches \(12, 12\): patches must divide a view"),
        trainer_of(settings_of(tiny_shards, objectives=objectives)),
    ):
        pass


def test_recipe_is_the_authors_shortest_run() -> None:
    settings, told = recipe("imagenet_dino_vits16"), FIGURES["recipe"]
    dino, optim = settings.objectives["dino"], settings.optim
    assert isinstance(dino, DINOSettings)
    assert (settings.epochs, settings.global_batch, optim.lr) == (told["epochs"], told["batch"], 5e-4 * told["batch"] / 256)
    assert optim.warmup_frac * settings.epochs == pytest.approx(told["warmup_epochs"])
    assert [optim.weight_decay, optim.final_weight_decay] == told["weight_decay"]
    assert (optim.final_lr, optim.clip_norm, optim.clip_by) == (told["min_lr"], told["clip_per_parameter"], "parameter")
    assert settings.model.drop_path == told["drop_path_student"]
    assert [dino.teacher_momentum, dino.final_teacher_momentum] == told["ema"]
    assert (dino.prototypes, dino.teacher_temperature, dino.student_temperature) == (
        told["out_dim"],
        told["teacher_temp"],
        told["student_temp"],
    )
    assert [law_of(family) for family in dino.families("dino")] == [law_of_figure(view) for view in told["views"]]


def law_of(family: ViewFamily) -> tuple[Any, ...]:
    law, color = family.law, family.color
    assert isinstance(law, Independent) and color is not None
    jitter = (color.jitter_prob, color.brightness, color.contrast, color.saturation, color.hue)
    return family.size_px[0], tuple(law.area_frac), family.mirror, jitter, color.gray_prob, color.blur_prob, color.solarize_prob


def law_of_figure(view: dict[str, Any]) -> tuple[Any, ...]:
    jitter = tuple(view[name] for name in ("jitter_p", "brightness", "contrast", "saturation", "hue"))
    assert view["flip"] == 0.5
    return view["px"], tuple(view["scale"]), "view", jitter, view["gray_p"], view["blur_p"], view["solarize_p"]
