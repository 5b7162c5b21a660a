"""What an objective may rely on, held by a toy host that needs all of it: a teacher, a center, a mask, a schedule, a layer that rests.

Runs are compared bit for bit on the CPU where nothing else computes; micro-batches and ranks, which add up otherwise, within tolerances
that the nearest mistake fails. The toy is no method: it is what the interface has to carry.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from wherefrom.pipeline import Batch, Independent, ShardIndex, ViewFamily, keyed_permutations
from wherefrom.train import (
    Encode,
    Encoder,
    EvaluationSettings,
    ModelSettings,
    Objective,
    OptimSettings,
    Progress,
    Reporter,
    RunFolder,
    RuntimeSettings,
    ShardPictures,
    Step,
    Terms,
    Trainer,
    TrainSettings,
    batch_norm_over_ranks,
    checkpoint,
    evaluate_labels,
    follow,
    gathered,
    run,
    spread,
)
from wherefrom.train.evaluation.report import evaluate_run
from wherefrom.train.loop import accelerator_for
from wherefrom.train.run_folder import read_metrics


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    """What differs between toys."""

    size_px: int = 24
    weight: float = 1.0
    views: int = 2
    coupled: bool = False  # BatchNorm in the head, and the others of the batch as negatives
    resting: bool = False  # the first update reaches two last layers, each later one only one of them

    def objective(self, name: str) -> "Toy":
        return Toy(self, name)


class Toy(Objective):
    """Tell what a centered teacher says of a view, from half of its patches; everything that a host may need, and no method."""

    center: Tensor
    planted: Tensor | None = None  # features to look at in place of its own

    def __init__(self, settings: ToySettings, name: str = "toy") -> None:
        super().__init__()
        self.settings, self.name = settings, name
        self.couples_samples = settings.coupled
        self.leaves_parameters_unused = settings.resting
        self.families = (ViewFamily(name=name, views=settings.views, size_px=(24, 24), law=Independent(), min_side_px=4),)
        self.heard: list[tuple[str, Progress]] = []

    def setup(self, encoder: Encoder) -> None:
        width = encoder.width
        self.teacher = encoder.slow_copy()
        norm = [nn.BatchNorm1d(width)] if self.settings.coupled else []
        self.head = batch_norm_over_ranks(nn.Sequential(nn.Linear(width, width), *norm, nn.GELU()))
        self.last = nn.Linear(width, 8, bias=False)
        self.second = nn.Linear(width, 8, bias=False) if self.settings.resting else None
        self.register_buffer("center", torch.zeros(8))

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        self.heard.append(("forward", progress))
        views = batch.family(self.name)
        keep = keyed_permutations(views.geometry, f"{self.name}/mask", 4)[..., :2]
        tokens = encode(views, keep=keep).tokens.mean(-2).flatten(0, 1)  # (B V, D)
        student = self.told(self.head(tokens), progress)
        with torch.no_grad():
            teacher = self.last(self.teacher.encode(views).summary).flatten(0, 1)
        sharp = ((teacher - self.center) * (1 + progress.epoch)).softmax(-1)
        losses = {"agree": -(sharp * student.log_softmax(-1)).sum(-1).mean()}
        if self.settings.coupled:
            mine, others = F.normalize(student, dim=-1), F.normalize(gathered(student), dim=-1)
            losses["apart"] = (mine @ others.mT).exp().mean()
        seen_by = {"norm": student.norm(dim=-1).mean()} | spread(tokens if self.planted is None else self.planted)
        return Terms(losses=losses, meters=seen_by, seen={"teacher": teacher.mean(0)})

    def told(self, hidden: Tensor, progress: Progress) -> Tensor:
        """Return what the last layer says, or the second one, or at first both."""
        if self.second is None:
            return self.last(hidden)
        both = (self.last(hidden), self.second(hidden))
        return both[0] + both[1] if progress.update == 0 else both[progress.update % 2]

    def before_update(self, progress: Progress) -> None:
        self.heard.append(("before_update", progress))
        if progress.epoch < 0.4:
            self.last.weight.grad = None

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        self.heard.append(("after_step", progress))
        self.center.lerp_(seen["teacher"], 0.1)
        follow(self.teacher, encoder, momentum=0.9)

    def exported(self, encoder: Encoder) -> Encoder:
        return self.teacher


def toys(data: Path | str, *, updates: int = 6, accumulation: int = 1, toy: ToySettings | None = None, **changes: Any) -> TrainSettings:
    """Return the settings of a run of a toy that takes about a second; five updates an epoch."""
    settings = TrainSettings(
        recipe="demo",
        data=str(data),
        global_batch=8,
        updates=updates,
        model=ModelSettings(view_size_px=24, patch_size_px=12, width=32, depth=1, heads=2, positions="sincos", frozen=("patch_embed",)),
        objectives={"toy": toy or ToySettings()},
        optim=OptimSettings(name="sgd", lr=0.3, clip_norm=1.0),
        evaluation=EvaluationSettings(every=0, knn_pictures=20, knn_held_out=10, short_knn_pictures=10, short_pictures=8),
        runtime=RuntimeSettings(
            device="cpu", renderer="torch", threads=1, log_every=1, checkpoint_every=2, accumulation=accumulation, log_with="none"
        ),
    )
    return dataclasses.replace(settings, **changes)


@contextlib.contextmanager
def trainer_of(settings: TrainSettings) -> Iterator[tuple[Trainer, Toy]]:
    """Yield a trainer and its toy."""
    assert settings.data is not None
    AcceleratorState._reset_state(reset_partial_state=True)  # of another precision
    trainer = Trainer(settings, ShardIndex.open(settings.data), accelerator_for(settings))
    with contextlib.closing(trainer):
        toy = trainer.step.objectives["toy"]
        assert isinstance(toy, Toy)
        yield trainer, toy


def rows_of(settings: TrainSettings) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Return what every update of a run measures, and the weights that it ends with."""
    with trainer_of(settings) as (trainer, _):
        rows = []
        for _ in range(trainer.updates):
            trainer.update()
            rows.append(trainer.window.take())
        return rows, {name: tensor.clone() for name, tensor in trainer.step.state_dict().items()}


def furthest(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Return the largest difference of any number of any update, of the larger."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    pairs = [(row[name], other[name]) for row, other in zip(ours, theirs, strict=True) for name in row]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-3) for a, b in pairs)


@pytest.fixture
def shards(tiny_shards: Path) -> Path:
    return tiny_shards / "train.tar"


@pytest.mark.core
def test_progress_is_known_before_every_forward_and_the_same_around_an_update(shards: Path) -> None:
    with trainer_of(toys(shards, accumulation=2)) as (trainer, toy):
        assert toy.heard == []  # the dry pass was not its business
        for _ in range(6):
            trainer.update()
        calls = ["forward", "forward", "before_update", "after_step"]
        assert [what for what, _ in toy.heard] == calls * 6
        expected = [Progress(update=update, updates=6, updates_per_epoch=5) for update in range(6)]
        assert [progress for _, progress in toy.heard] == [progress for progress in expected for _ in calls]
        assert [progress.epoch for progress in expected] == [0, 0.2, 0.4, 0.6, 0.8, 1]


@pytest.mark.core
def test_what_forward_saw_comes_to_after_step_as_the_mean_and_without_the_dry_pass(shards: Path) -> None:
    means = []
    with trainer_of(toys(shards, accumulation=4)) as (trainer, toy):
        plain = toy.forward

        def forward(*arguments: Any) -> Terms:
            terms = plain(*arguments)
            means.append(terms.seen["teacher"])
            return terms

        toy.forward = forward  # type: ignore[method-assign]
        trainer.update()
        torch.testing.assert_close(toy.center, 0.1 * torch.stack(means).mean(0))
        assert len(means) == 4 and not torch.allclose(means[0], means[1], atol=1e-4)


@pytest.mark.core
def test_micro_batches_change_nothing_where_samples_do_not_see_one_another(shards: Path) -> None:
    whole, state = rows_of(toys(shards))
    for accumulation in (2, 4):
        rows, parts = rows_of(toys(shards, accumulation=accumulation))
        whole_means, means = ([{name: row[name] for name in row if "feature_" not in name} for row in each] for each in (whole, rows))
        assert furthest(means, whole_means) < 1e-4
        torch.testing.assert_close(parts["objectives.toy.center"], state["objectives.toy.center"], rtol=1e-4, atol=1e-6)
    # control: where they do, they are another method
    first, second = (rows_of(toys(shards, updates=1, accumulation=a, toy=ToySettings(coupled=True)))[0] for a in (1, 2))
    assert furthest(first, second) > 1e-2


@pytest.mark.core
def test_a_run_goes_on_bit_for_bit_with_its_teacher_and_its_center(shards: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(toys(shards), reporter=Reporter(), out=whole)
    run(toys(shards), reporter=Reporter(), out=parts)
    (RunFolder(parts).checkpoints / "latest").write_text("update-00000004\n")
    shutil.rmtree(RunFolder(parts).checkpoints / "update-00000006")
    run(toys(shards), reporter=Reporter(), out=parts, resume=True)
    ours, theirs = (load_file(checkpoint.latest(RunFolder(out).checkpoints) / "weights.safetensors") for out in (whole, parts))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["objectives.toy.center"].any()
    logged = [[line["losses"] | line["gradients"] for line in read_metrics(RunFolder(out), "train")] for out in (whole, parts)]
    assert logged[0] == logged[1]


@pytest.mark.core
def test_gradients_that_an_objective_drops_are_neither_clipped_nor_followed(shards: Path) -> None:
    with trainer_of(toys(shards)) as (trainer, toy):
        start = toy.last.weight.detach().clone()
        norms = []
        for _ in range(4):
            trainer.update()
            norms.append((trainer.window.take()["gradient:toy"], torch.equal(toy.last.weight, start)))
        assert [rested for _, rested in norms] == [True, True, False, False]
    with trainer_of(toys(shards)) as (trainer, toy):
        toy.before_update = lambda progress: None  # type: ignore[method-assign]
        trainer.update()
        assert trainer.window.take()["gradient:toy"] > norms[0][0]  # with the last layer's


@pytest.mark.core
def test_the_teacher_is_evaluated_and_written_out_where_the_method_prefers_it(tiny_shards: Path, tmp_path: Path) -> None:
    run(toys(tiny_shards / "train.tar", val=str(tiny_shards / "val.tar")), reporter=Reporter(), out=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    newest = checkpoint.latest(folder.checkpoints)
    assert newest is not None
    weights, written = load_file(newest / "weights.safetensors"), load_file(folder.encoder)
    prefix = "objectives.toy.teacher.model."
    assert written.keys() == {name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
    assert all(torch.equal(written[name], weights[f"{prefix}{name}"]) for name in written)
    assert any(not torch.equal(written[name], weights[f"encoder.model.{name}"]) for name in written)
    assert json.loads((folder.model / "config.json").read_text())["wherefrom"]["network"] == "teacher"


@pytest.mark.core
def test_labels_are_told_by_the_exported_network(tiny_shards: Path) -> None:
    settings = toys(tiny_shards / "train.tar")
    with trainer_of(settings) as (trainer, toy), ShardPictures(trainer.loader.index, renderer="torch", threads=1) as pictures:
        for _ in range(4):
            trainer.update()
        sides = {"view_px": 24, "picture_px": 24}
        report = evaluate_run(trainer.step, pictures, pictures, settings.evaluation, at=trainer.progress, full=True, **sides).report[
            "labels"
        ]
        limits = {"limit": settings.evaluation.knn_pictures, "held_out_limit": settings.evaluation.knn_held_out}
        teacher, student = (
            evaluate_labels(network, pictures, pictures, **sides, **limits) for network in (toy.teacher, trainer.step.encoder)
        )
    assert teacher is not None and student is not None
    assert report == teacher.as_dict() | {"scores": report["scores"]} and list(report["scores"]) == list(teacher.as_dict()["scores"])
    assert teacher.scores != student.scores


@pytest.mark.core
@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_collapse_is_said_at_the_next_line_of_the_log(noise: float, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(Toy, "planted", torch.ones(32, 64) + noise * torch.randn(32, 64))
    reporter = _Lines()
    run(toys(shards, updates=2), reporter=reporter, out=tmp_path / "run")
    said = [line for line in reporter.lines if "collapsed" in line]
    assert [line.partition(",")[0] for line in said] == (
        [f"toy: features have collapsed at update {update}" for update in (1, 2)] if noise < 0.01 else []
    )


@pytest.mark.core
def test_spread_is_that_of_a_sphere_of_a_cone_of_a_line_and_of_a_point() -> None:
    torch.manual_seed(0)
    sphere, one = torch.randn(4000, 2, 16), torch.randn(16)
    line = one * torch.tensor([1.0, -1.0]).repeat(50)[:, None]
    cone = sphere + 100 * one / one.norm()  # as random encoders have them: a direction that all share, and differences beside it
    cases = ((sphere, 1.0, 16.0), (cone, 15**0.5 / 100, 15.0), (line, 1.0, 1.0), (sphere[:8], 1.0, 8.0), (one.expand(100, 16), 0.0, None))
    for features, std, rank in cases:
        meters = spread(features)
        many = len(features) > 8
        assert float(meters["feature_std"]) == pytest.approx(std, rel=0.05 if many else 0.2, abs=1e-6)
        assert rank is None or float(meters["feature_rank"]) == pytest.approx(rank, rel=0.05 if many else 0.3)


@pytest.mark.core
def test_a_batch_that_a_method_cannot_learn_from_is_refused_before_anything_is_written(shards: Path, tmp_path: Path) -> None:
    settings = toys(shards, toy=ToySettings(coupled=True), global_batch=1)
    settings = settings.with_objectives(toy=dataclasses.replace(settings.objectives["toy"], views=1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        run(settings, reporter=Reporter(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.core
def test_an_objective_that_exports_no_encoder_is_named() -> None:
    class Wrong(Toy):
        def exported(self, encoder: Encoder) -> Any:
            return encoder.model

    step = Step(Encoder(ModelSettings(name="resnet10t")), [Wrong(ToySettings())], seed=0)
    with pytest.raises(ValueError, match=r"objective 'toy' exports ResNet, expected an Encoder, such as encoder\.slow_copy\(\)"):
        step.exported()


class _Lines(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.core
@pytest.mark.parametrize("coupled", [False, True])
def test_where_samples_see_one_another_a_run_goes_on_with_its_micro_batches_alone(coupled: bool, shards: Path, tmp_path: Path) -> None:
    toy = ToySettings(coupled=coupled)
    run(toys(shards, toy=toy, updates=2), reporter=Reporter(), out=tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    reporter = _Lines()
    refusal = (
        r"^runtime\.accumulation=2: the run to go on with has 1, and in 'toy' the samples of a micro-batch see one another; "
        "take its value, or another --out$"
    )
    with pytest.raises(ValueError, match=refusal) if coupled else contextlib.nullcontext():
        run(toys(shards, toy=toy, updates=2, accumulation=2), reporter=reporter, out=tmp_path / "run", resume=True)
    if coupled:
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    else:
        assert any("not bit for bit, for accumulation is 2, was 1: losses differ by rounding" in line for line in reporter.lines)


@pytest.mark.core
@pytest.mark.parametrize("coupled", [False, True])
def test_a_run_that_goes_on_with_another_number_of_ranks_says_so(coupled: bool, shards: Path, tmp_path: Path) -> None:
    settings = toys(shards, toy=ToySettings(coupled=coupled), updates=2)
    run(settings, reporter=Reporter(), out=tmp_path / "run")
    metrics = RunFolder(tmp_path / "run").metrics
    for ranks in (1, 2):
        metrics.write_text(metrics.read_text().replace('"ranks": 1', f'"ranks": {ranks}'))
        reporter = _Lines()
        run(settings, reporter=reporter, out=tmp_path / "run", resume=True)
        said = [line for line in reporter.lines if "ranks" in line]
        assert len(said) == ranks - 1
        assert all("not bit for bit, for ranks is 1, was 2: losses differ by rounding" in line for line in said)
        assert all(("(what toy gathers is the same)" in line) == coupled for line in said)


@pytest.mark.core
def test_a_teacher_has_no_gradient_no_drop_path_and_is_compiled_where_the_encoder_is(shards: Path) -> None:
    model = dataclasses.replace(toys(shards).model, drop_path=0.5, depth=3)
    settings = toys(shards, model=model)
    settings = dataclasses.replace(settings, runtime=dataclasses.replace(settings.runtime, compile=True))
    with trainer_of(settings) as (trainer, toy):
        assert trainer.step.encoder._compiled_call_impl is not None
        assert toy.teacher._compiled_call_impl is not None
        assert not any(parameter.requires_grad for parameter in toy.teacher.parameters())
    encoder = Encoder(model).train()
    teacher, pixels = encoder.slow_copy().train(), torch.randn(16, 1, 3, 24, 24)
    assert torch.equal(teacher.encode(pixels).summary, teacher.encode(pixels).summary)
    assert not torch.equal(encoder.encode(pixels).summary, encoder.encode(pixels).summary)
    assert torch.equal(teacher.encode(pixels).summary, encoder.eval().encode(pixels).summary)


def test_a_compiled_run_of_a_host_with_a_teacher_runs_in_bfloat16(shards: Path) -> None:
    settings = toys(shards, updates=2, precision="bfloat16")
    rows, _ = rows_of(dataclasses.replace(settings, runtime=dataclasses.replace(settings.runtime, compile=True)))
    assert furthest(rows, rows_of(settings)[0]) < 0.1


@pytest.mark.core
def test_a_teacher_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight is \(2, 2\) in the teacher and \(3, 2\) in what it follows; make it by a copy"):
        follow(nn.Linear(2, 2), nn.Linear(2, 3), momentum=0.9)


# Two processes


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def on_two_ranks(folder: Path, shards: Path, toy: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each of two ranks observes of a run of a toy."""
    folder.mkdir()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), str(shards), json.dumps(toy)]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE) for rank in "01"
    ]
    for process in processes:
        _, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint.decode()[-3000:]
    return [json.loads((folder / f"rank.{rank}").read_text()) for rank in range(2)]


def observe(folder: Path, shards: Path, toy: dict[str, Any]) -> None:
    """Be one of two ranks."""
    rows, state = rows_of(toys(shards, toy=ToySettings(**toy)))
    sums = {name: tensor.double().sum().item() for name, tensor in state.items()}
    (folder / f"rank.{os.environ['RANK']}").write_text(json.dumps({"rows": rows, "sums": sums}))
    torch.distributed.destroy_process_group()


@pytest.mark.core
def test_two_ranks_are_one_process_for_a_host_whose_samples_see_one_another(shards: Path, tmp_path: Path) -> None:
    toy = {"coupled": True, "resting": True}
    rows, state = rows_of(toys(shards, toy=ToySettings(**toy)))
    first, second = on_two_ranks(tmp_path / "two", shards, toy)
    assert first == second
    assert furthest(first["rows"], rows) < 1e-5
    other, _ = rows_of(toys(shards, accumulation=2, toy=ToySettings(**toy)))
    assert furthest(other, rows) > 1e-2  # control: ranks by themselves would be micro-batches
    for name in ("center", "head.1.running_mean", "head.1.running_var"):
        expected = state[f"objectives.toy.{name}"].double().sum().item()
        assert first["sums"][f"objectives.toy.{name}"] == pytest.approx(expected, rel=1e-5), name


if __name__ == "__main__":
    observe(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
