"""A run as a whole, in this process, on a tiny model and tiny shards: what it writes, when it stops, what it refuses."""

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator, tracking
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from torch import Tensor, nn

from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.laws import Disjoint, Independent, Paired
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.views import Batch
from wherefrom.train import checkpoint
from wherefrom.train import trainer as trainer_module
from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.report import evaluate_run
from wherefrom.train.loop import _open_data, accelerator_for, run
from wherefrom.train.objective import Encode, Progress, Terms
from wherefrom.train.objectives import DenseSpatialSettings, SpatialPrediction
from wherefrom.train.objectives.spatial import SpatialSettings
from wherefrom.train.optimizer import gated_step, make_optimizer
from wherefrom.train.ranks import Ranks
from wherefrom.train.recipes import recipe
from wherefrom.train.reporting import LogRecord, Reporter, Summary
from wherefrom.train.run_folder import RunFolder, read_metrics
from wherefrom.train.settings import EvaluationSettings, IndexSettings, OptimSettings, RuntimeSettings, TrainSettings, read_settings
from wherefrom.train.trainer import Trainer

pytestmark = pytest.mark.core


def tiny(shards: Path, *, updates: int = 6, **changes: Any) -> TrainSettings:
    """Return the settings of a run that takes about a second."""
    settings = TrainSettings(
        recipe="demo",
        data=str(shards / "train.tar"),
        global_batch=8,
        updates=updates,
        model=ModelSettings(view_size_px=24, patch_size_px=12, width=32, depth=1, heads=2),
        objectives={"spatial": SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16)), views=3, size_px=24, color=None, min_side_px=4)},
        evaluation=EvaluationSettings(
            every=0, pictures=16, head_pictures=16, head_steps=5, knn_pictures=40, short_pictures=8, short_knn_pictures=20
        ),
        runtime=RuntimeSettings(device="cpu", renderer="torch", threads=1, log_every=1, checkpoint_every=2, keep=2),
    )
    return dataclasses.replace(settings, **changes)


def evaluated(shards: Path) -> TrainSettings:
    """Return the same run, with held-out pictures: what it learns does not depend on them."""
    settings = tiny(shards, val=str(shards / "val.tar"))
    return dataclasses.replace(settings, evaluation=dataclasses.replace(settings.evaluation, every=4))


def losses(folder: Path) -> dict[int, Any]:
    """Return what every logging step logged, without speeds."""
    logged = read_metrics(RunFolder(folder), "train")
    return {record["update"]: (record["loss"], record["losses"], record["gradients"], record["lr"]) for record in logged}


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the newest checkpoint."""
    newest = checkpoint.latest(RunFolder(folder).checkpoints)
    assert newest is not None
    return load_file(newest / "weights.safetensors")


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six updates that nothing disturbed, with held-out pictures."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(evaluated(tiny_shards), reporter=Reporter(), out=out)
    return out


class _Sends(Reporter):
    """A reporter that sends this process a signal at one update."""

    def __init__(self, number: signal.Signals, at: int) -> None:
        self.number, self.at = number, at

    def logged(self, record: LogRecord) -> None:
        if record.update == self.at:
            os.kill(os.getpid(), self.number)


class _Lines(Reporter):
    """A reporter that keeps its messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, line: str) -> None:
        self.lines.append(line)


def test_a_run_folder_holds_settings_log_checkpoints_and_encoder(finished: Path, tiny_shards: Path) -> None:
    folder = RunFolder(finished)
    assert read_settings(folder.settings, recipe("imagenet_sp_vits16")) == evaluated(tiny_shards)
    assert list(losses(finished)) == [1, 2, 3, 4, 5, 6]
    assert all(json.loads(text) for text in folder.metrics.read_text().splitlines())
    assert any((finished / "tensorboard").iterdir())
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["latest", "update-00000004", "update-00000006"]
    for left in finished.rglob(".*"):
        raise AssertionError(f"left over: {left}")


def test_every_point_of_a_curve_is_of_the_same_protocol_and_the_full_figures_stand_in_a_file(finished: Path, tiny_shards: Path) -> None:
    folder, settings = RunFolder(finished), evaluated(tiny_shards)
    amid, last = read_metrics(folder, "evaluation")
    assert (amid["update"], last["update"]) == (4, 6)
    names = {"spatial/r2_x", "spatial/r2_y", "spatial/r2_scale", "k-NN encoder", "k-NN random encoder", "k-NN raw pixels"}
    names |= {f"{part} token: k-NN {network}" for part in ("class", "mean") for network in ("encoder", "random encoder")}
    assert amid["curves"].keys() == last["curves"].keys() == names
    for floor in ("k-NN random encoder", "k-NN raw pixels"):  # the same pictures, so that only the encoder moves
        assert amid["curves"][floor] == last["curves"][floor]

    # measured once more by the short protocol, from the weights that the run ended with
    report = json.loads(folder.evaluation.read_text())
    trainer = Trainer(settings, ShardIndex.open(str(tiny_shards / "train.tar")), accelerator_for(settings))
    options = {"renderer": "torch", "threads": 1}
    with (
        contextlib.closing(trainer),
        ShardPictures(trainer.loader.index, **options) as train,
        ShardPictures(ShardIndex.open(settings.val), **options) as held_out,
    ):
        newest = checkpoint.latest(folder.checkpoints)
        assert newest is not None
        trainer.restore(newest)
        sides = {"view_px": settings.label_view_px, "picture_px": settings.label_picture_px}
        short, full = (
            evaluate_run(
                trainer.step,
                train,
                held_out,
                settings.evaluation,
                at=trainer.progress,
                full=full,
                **sides,
            )
            for full in (False, True)
        )
    assert (short.curves, full.curves) == (last["curves"], {})
    assert full.report == report | {"spatial": full.report["spatial"], "labels": full.report["labels"]}
    assert list(full.report["spatial"]["rows"][0]["r2"]) == report["spatial"]["rows"][0]["r2"]
    assert (report["labels"]["train"], report["labels"]["held_out"], report["labels"]["classes"]) == (40, 16, 4)
    assert (short.report["labels"]["train"], short.report["labels"]["held_out"]) == (20, 8)


def test_held_out_pictures_that_are_too_small_stop_no_run(
    tiny_shards: Path, tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    picture = jpeg_bytes(np.zeros((12, 12, 3), np.uint8))
    small = make_shard(tmp_path / "small.tar", [(f"{i}", {"jpg": picture, "cls": str(i % 4).encode()}) for i in range(8)])
    summary = run(dataclasses.replace(evaluated(tiny_shards), val=str(small)), reporter=Reporter(), out=tmp_path / "run")
    assert (summary.update, summary.stopped_by) == (6, None)
    report = json.loads(RunFolder(tmp_path / "run").evaluation.read_text())
    assert report["spatial"]["not_measured"].startswith("8 pictures, 0 pairs that count")
    assert report["labels"]["held_out"] == 8


def test_timm_loads_the_exported_encoder(finished: Path, tiny_shards: Path) -> None:
    folder = RunFolder(finished)
    ours = Encoder(tiny(tiny_shards).model).eval()
    ours.model.load_state_dict(load_file(folder.encoder))
    theirs = timm.create_model(f"local-dir:{folder.model}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(ours(pixels)[0], theirs(pixels))
    trained = {
        name.removeprefix("encoder.model."): tensor for name, tensor in weights(finished).items() if name.startswith("encoder.model.")
    }
    assert_same_weights(load_file(folder.encoder), trained)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops_and_the_run_goes_on_as_if_it_had_not(
    number: signal.Signals, finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    out = tmp_path / "run"
    summary = run(tiny(tiny_shards), reporter=_Sends(number, at=3), out=out)
    assert (summary.stopped_by, summary.update) == (number.name, 4)  # the update that was under way is made and saved
    assert signal.getsignal(number) is before
    assert list(losses(out)) == [1, 2, 3, 4]
    summary = run(tiny(tiny_shards), reporter=Reporter(), out=out, resume=True)
    assert (summary.stopped_by, summary.update) == (None, 6)
    assert losses(out) == losses(finished)
    assert_same_weights(weights(out), weights(finished))


def test_a_schedulers_signal_that_comes_twice_stops_the_run_once_and_saved(finished: Path, tiny_shards: Path, tmp_path: Path) -> None:
    class SendsAgain(_Sends):
        def logged(self, record: LogRecord) -> None:
            if record.update >= self.at:
                os.kill(os.getpid(), self.number)

    out, before = tmp_path / "run", signal.getsignal(signal.SIGUSR1)
    summary = run(tiny(tiny_shards), reporter=SendsAgain(signal.SIGUSR1, at=3), out=out)
    assert (summary.stopped_by, summary.update) == ("SIGUSR1", 4)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert_same_weights(weights(out), load_file(RunFolder(finished).checkpoints / "update-00000004" / "weights.safetensors"))


def test_a_live_run_is_not_gone_on_with_by_a_second_process(tiny_shards: Path, tmp_path: Path) -> None:
    settings, out, refusals = tiny(tiny_shards), tmp_path / "run", []

    class GoesOn(Reporter):
        def logged(self, record: LogRecord) -> None:
            if record.update == 3:
                with pytest.raises(ValueError, match=f"process {os.getpid()} on .* is writing this run") as refused:
                    run(settings, reporter=Reporter(), out=out, resume=True)
                refusals.append(refused)

    run(settings, reporter=GoesOn(), out=out)
    assert len(refusals) == 1
    written = [(record["kind"], record["update"]) for record in read_metrics(RunFolder(out))]
    assert written == [("start", 0), *(("train", update) for update in range(1, 7))]
    (out / ".lock").write_text("left by a kill")
    assert run(settings, reporter=Reporter(), out=out, resume=True).update == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_in_the_last_evaluation_stops_a_saved_run_which_is_measured_when_it_goes_on(
    number: signal.Signals, finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    class InterruptsTheLastEvaluation(_Sends):
        over = False
        summary: Summary | None = None

        def logged(self, record: LogRecord) -> None:
            self.over = record.update == record.updates

        def progressed(self, what: str, done: int, total: int) -> None:
            if self.over:
                os.kill(os.getpid(), self.number)

        def finished(self, summary: Summary) -> None:
            self.summary = summary

    before, out, reporter = signal.getsignal(number), tmp_path / "run", InterruptsTheLastEvaluation(number, at=6)
    summary = run(evaluated(tiny_shards), reporter=reporter, out=out)
    assert (summary.stopped_by, summary.update, summary.updates) == (number.name, 6, 6)
    assert reporter.summary == summary
    assert signal.getsignal(number) is before
    assert not RunFolder(out).evaluation.exists()
    assert run(evaluated(tiny_shards), reporter=Reporter(), out=out, resume=True).stopped_by is None
    assert RunFolder(out).evaluation.read_bytes() == RunFolder(finished).evaluation.read_bytes()


def test_a_run_that_was_stopped_or_killed_where_an_evaluation_is_due_makes_it_once_when_it_goes_on(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    class BreaksAnEvaluation(Reporter):
        def progressed(self, what: str, done: int, total: int) -> None:
            if read_metrics(RunFolder(killed), "train"):
                raise RuntimeError("killed")

    settings, stopped, killed = evaluated(tiny_shards), tmp_path / "stopped", tmp_path / "killed"
    assert run(settings, reporter=_Sends(signal.SIGTERM, at=3), out=stopped).update == 4
    with pytest.raises(RuntimeError, match="killed"):
        run(settings, reporter=BreaksAnEvaluation(), out=killed)
    for out in (stopped, killed):
        assert read_metrics(RunFolder(out), "evaluation") == []
        summary = run(settings, reporter=_Sends(signal.SIGTERM, at=6), out=out, resume=True)  # during the last update
        assert (summary.stopped_by, summary.update) == ("SIGTERM", 6)
        assert not RunFolder(out).evaluation.exists() and not RunFolder(out).encoder.exists()
    for _ in range(2):  # the second time it is finished
        assert run(settings, reporter=Reporter(), out=stopped, resume=True).stopped_by is None
        assert read_metrics(RunFolder(stopped), "evaluation") == read_metrics(RunFolder(finished), "evaluation")
    assert RunFolder(stopped).evaluation.read_bytes() == RunFolder(finished).evaluation.read_bytes()
    assert read_metrics(RunFolder(killed), "evaluation") == read_metrics(RunFolder(finished), "evaluation")[:1]


def test_a_resumed_run_logs_the_means_of_whole_windows(tiny_shards: Path, tmp_path: Path) -> None:
    """Checkpoints fall between the lines of the log; the updates before them count all the same."""
    runtime = RuntimeSettings(device="cpu", renderer="torch", threads=1, log_every=5, checkpoint_every=3)
    settings = tiny(tiny_shards, updates=10, runtime=runtime)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(settings, reporter=Reporter(), out=whole)
    run(settings, reporter=_Sends(signal.SIGTERM, at=5), out=parts)
    checkpoints = RunFolder(parts).checkpoints
    (checkpoints / checkpoint.LATEST).write_text("update-00000003\n")  # as if killed before the sixth update was saved
    run(settings, reporter=Reporter(), out=parts, resume=True)
    assert list(losses(whole)) == [5, 10]
    assert losses(parts) == losses(whole)


def test_a_run_that_goes_on_says_where_and_whether_bit_for_bit(finished: Path, tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / checkpoint.LATEST).write_text("update-00000004\n")

    def line(where: str = "update 4 of 6: epoch 0, step 4, sample 32 of 40", *, metrics: tuple[str, str] = ("", ""), **runtime: Any) -> str:
        """Go on from the same checkpoint with some of `runtime`, and after `metrics` replaced in the log; compare the line that is said."""
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder.path, out)
        log = RunFolder(out).metrics
        log.write_text(log.read_text().replace(*metrics))
        reporter = _Lines()
        settings = tiny(tiny_shards, runtime=dataclasses.replace(tiny(tiny_shards).runtime, **runtime))
        run(settings, reporter=reporter, out=out, resume=True)
        [said] = [line for line in reporter.lines if line.startswith("goes on")]
        start, rest = said.split("; ", 1)
        assert start == f"goes on at {where}"
        return rest

    rounding = "losses differ by rounding"
    parts = f"{rounding}, by more with drop-path"
    assert line() == "bit for bit"
    assert line(accumulation=2) == f"not bit for bit, for accumulation is 2, was 1: {parts}, records do not"
    assert line(renderer="native") == f"not bit for bit, for renderer is native, was torch: pixels and {rounding}, records do not"
    threads = torch.get_num_threads()
    for metrics, change, effect in (
        (('"ranks": 1', '"ranks": 2'), "ranks is 1, was 2", parts),
        (('"device": "cpu"', '"device": "NVIDIA H200"'), "device is cpu, was NVIDIA H200", rounding),
        ((f'"threads": {threads}', '"threads": 99'), f"threads is {threads}, was 99", rounding),
        ((f'"torch": "{torch.__version__}"', '"torch": "2.0"'), f"torch is {torch.__version__}, was 2.0", rounding),
    ):
        assert line(metrics=metrics) == f"not bit for bit, for {change}: {effect}, records do not"
    # of a run of before these were logged, and of one that was killed before its first checkpoint
    assert line(metrics=('"device": "cpu", ', "")) == "bit for bit"
    (folder.checkpoints / checkpoint.LATEST).unlink()
    reporter = _Lines()
    run(tiny(tiny_shards), reporter=reporter, out=folder.path, resume=True)
    assert "goes on at the start: no checkpoint was saved yet" in reporter.lines


class _Rests(SpatialPrediction):
    """An objective whose head no gradient reaches."""

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        terms = super().forward(batch, encode, progress)
        return dataclasses.replace(terms, losses={name: value.detach() for name, value in terms.losses.items()})


def test_a_run_says_which_parameters_it_froze_and_which_it_left_to_learn_later(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(tiny_shards, updates=1)
    spatial = settings.objectives["spatial"]
    assert isinstance(spatial, SpatialSettings)
    host, rests = SpatialPrediction(spatial), _Rests(spatial, name="rests")
    absent = SpatialPrediction(dataclasses.replace(spatial, weight=0.0), name="absent")
    monkeypatch.setattr(TrainSettings, "make_objectives", lambda _: (host, rests, absent))
    reporter = _Lines()
    run(settings, reporter=reporter, out=tmp_path / "run")
    names_of = dict(line.split(": ", 1) for line in reporter.lines)
    for words, objective in (
        ("frozen, no objective reaches them", absent),
        ("not reached before the first update, and free to be later", rests),
    ):
        assert names_of[words].split(", ") == [f"objectives.{objective.name}.{name}" for name, _ in objective.named_parameters()]


class _Tracks(GeneralTracker):
    """A tracker that keeps what it is handed."""

    name, requires_logging_directory = "wandb", False
    began: ClassVar[list[dict[str, Any]]] = []
    logged: ClassVar[list[tuple[int | None, dict[str, float]]]] = []

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.began.append({"project": project} | options)

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.began[-1] |= {"seed": values["seed"]}

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.logged.append((step, values))


def test_curves_go_to_the_tracker_that_is_named_or_to_none(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of trainers that other tests made
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", _Tracks)
    for name in ("wandb", "none"):
        settings = tiny(tiny_shards, updates=2, runtime=dataclasses.replace(tiny(tiny_shards).runtime, log_with=name))
        run(settings, reporter=Reporter(), out=tmp_path / name)
        assert not (tmp_path / name / "tensorboard").exists()
    assert _Tracks.began == [{"project": "wherefrom", "name": "wandb", "seed": 0}]
    assert [step for step, _ in _Tracks.logged] == [1, 2]
    assert _Tracks.logged[1][1]["loss"] == losses(tmp_path / "wandb")[2][0]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    settings = tiny(tiny_shards, runtime=RuntimeSettings(device="cpu", log_with="wandb"))
    with pytest.raises(ValueError, match=r"^runtime\.log_with='wandb': not installed; pip install wandb, or take 'tensorboard' or 'none'$"):
        run(settings, reporter=Reporter(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_a_run_with_one_line_and_with_room_it_goes_on(finished: Path, tiny_shards: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills(Reporter):
        def logged(self, record: LogRecord) -> None:
            if record.update == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    out = tmp_path / "run"
    try:
        with pytest.raises(OSError, match=r"update-00000004: cannot be written \(.*\), .* MB are free there; make room") as refused:
            run(tiny(tiny_shards), reporter=Fills(), out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refused.value)
    assert [path.name for path in sorted(RunFolder(out).checkpoints.iterdir())] == ["latest", "update-00000002"]
    run(tiny(tiny_shards), reporter=Reporter(), out=out, resume=True)
    assert losses(out) == losses(finished)
    assert_same_weights(weights(out), weights(finished))


def test_a_run_goes_on_with_the_renderer_that_auto_took(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice changes between two parts of a run, as on another machine; the control shows that it would be seen."""

    def going_by(name: str, *, second: str, then: str) -> tuple[dict[int, Any], list[str]]:
        out, reporter = tmp_path / name, _Lines()
        for part, (setting, served) in enumerate((("auto", "torch"), (second, then))):
            monkeypatch.setattr(
                trainer_module, "choose_renderer", lambda setting, *_, served=served: (served if setting == "auto" else setting, "")
            )
            settings = tiny(tiny_shards, runtime=dataclasses.replace(tiny(tiny_shards).runtime, renderer=setting))
            run(settings, reporter=reporter if part else _Sends(signal.SIGTERM, at=2), out=out, resume=part == 1)
        written = read_settings(RunFolder(out).settings, recipe("demo")).runtime.renderer
        return losses(out), [written, *(line for line in reporter.lines if "renderer" in line)]

    whole, lines = going_by("same", second="auto", then="torch")
    assert lines == ["torch"]
    assert going_by("other machine", second="auto", then="native") == (whole, ["torch"])
    changed, lines = going_by("by a flag", second="native", then="native")
    assert lines[0] == "native"
    assert "not bit for bit, for renderer is native, was torch: pixels and losses differ by rounding" in lines[1]
    assert (changed[2] == whole[2], changed[6] == whole[6]) == (True, False)


def test_a_broken_loss_changes_no_weight_and_stops_the_run_at_the_log(tiny_shards: Path) -> None:
    index = ShardIndex.open(str(tiny_shards / "train.tar"))
    settings = tiny(tiny_shards)
    trainer = Trainer(settings, index, accelerator_for(settings))
    try:
        trainer.update()
        trainer.update()
        weights_before = {name: tensor.clone() for name, tensor in trainer.step.state_dict().items()}
        state = [tensor.clone() for buffers in trainer.optimizer.state.values() for tensor in buffers.values()]
        hook = trainer.step.objectives["spatial"].head.register_forward_hook(lambda _, __, out: (out[0] * math.nan, out[1]))
        trainer.update()
        hook.remove()
        trainer.update()  # what follows is finite again, and changes nothing either
        assert_same_weights(dict(trainer.step.state_dict()), weights_before)
        assert all(map(torch.equal, state, [tensor for buffers in trainer.optimizer.state.values() for tensor in buffers.values()]))
        with pytest.raises(FloatingPointError) as stopped:
            trainer.log()
        ids = trainer.loader.order.micro_batch(0, 2, 0).tolist()
        assert str(stopped.value).startswith("update 3: spatial/position is nan, spatial/scale is nan on rank 0, samples ")
        assert f"samples {', '.join(map(str, ids))};" in str(stopped.value)
    finally:
        trainer.close()


def test_a_meter_that_some_micro_batches_lack_is_a_mean_over_the_others(tiny_shards: Path) -> None:
    settings = tiny(tiny_shards, runtime=dataclasses.replace(tiny(tiny_shards).runtime, accumulation=4))
    trainer = Trainer(settings, ShardIndex.open(str(tiny_shards / "train.tar")), accelerator_for(settings))
    objective = trainer.step.objectives["spatial"]
    plain, calls = objective.forward, iter(range(8))

    def forward(*arguments: Any) -> Terms:
        terms, call = plain(*arguments), next(calls)
        return dataclasses.replace(terms, meters={**terms.meters} | ({"seldom": torch.tensor(float(call))} if call in (1, 2, 7) else {}))

    objective.forward = forward
    with contextlib.closing(trainer):
        for seldom in (1.5, 7.0):
            trainer.update()
            assert trainer.log().meters["spatial/seldom"] == seldom


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "muon"])
def test_a_gated_step_is_a_step_or_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = make_optimizer(model, OptimSettings(name=name, lr=0.1))
    for finite in (True, False, True):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        if not finite:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(math.nan)
        gated_step(optimizer, torch.tensor(finite))
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, old) != finite
            assert parameter.isfinite().all()


def test_weights_decay_in_matrices_only(tiny_shards: Path) -> None:
    encoder = Encoder(tiny(tiny_shards).model)
    optimizer = make_optimizer(encoder, OptimSettings(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
    assert decayed == {name for name, p in encoder.named_parameters() if p.ndim >= 2 and not name.endswith(("cls_token", "pos_embed"))}
    assert decayed
    with pytest.raises(ValueError, match="it has adam"):
        make_optimizer(encoder, OptimSettings(name="adamv"))


def test_runs_of_two_precisions_follow_one_another_in_a_process(tiny_shards: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of trainers that other tests made
    first_losses = []
    for number, precision in enumerate(("float32", "bfloat16", "float32")):
        out = tmp_path / str(number)
        run(tiny(tiny_shards, updates=1, precision=precision), reporter=Reporter(), out=out)
        assert not is_initialized()
        first_losses.append(losses(out)[1][0])
    assert (first_losses[0] == first_losses[2], first_losses[0] == first_losses[1]) == (True, False)
    # what a caller has set up is the caller's, and is not taken away
    Accelerator(cpu=True)
    run(tiny(tiny_shards, updates=1), reporter=Reporter(), out=tmp_path / "beside")
    assert is_initialized()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_launcher_that_starts_one_process_of_several_is_told_of(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is what `accelerate launch --cpu --num_processes 2` gives the only process that it starts."""
    for number, address in enumerate(("127.0.0.1", None)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        if address is not None:
            monkeypatch.setenv("MASTER_ADDR", address)
        reporter = _Lines()
        run(tiny(tiny_shards, updates=1), reporter=reporter, out=tmp_path / str(number))
        assert any("torchrun" in line for line in reporter.lines) == (address is not None)


def test_micro_batches_change_no_loss_and_no_update(tiny_shards: Path, tmp_path: Path) -> None:
    losses_of = {}
    for accumulation in (1, 2, 4):
        settings = tiny(tiny_shards, runtime=dataclasses.replace(tiny(tiny_shards).runtime, accumulation=accumulation))
        run(settings, reporter=Reporter(), out=tmp_path / str(accumulation))
        losses_of[accumulation] = losses(tmp_path / str(accumulation))
    for accumulation in (2, 4):
        for update, (loss, _, gradients, _) in losses_of[accumulation].items():
            assert loss == pytest.approx(losses_of[1][update][0], abs=1e-5)
            assert gradients["spatial"] == pytest.approx(losses_of[1][update][2]["spatial"], rel=1e-4)
    # control: another batch is another loss
    assert abs(losses_of[1][1][0] - losses_of[1][2][0]) > 1e-4


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "fewer samples than a batch": (lambda _: {"global_batch": 64}, "40 samples|samples=40|fewer samples"),
    "ranks and micro-batches that do not divide": (lambda s: {"runtime": RuntimeSettings(device="cpu", accumulation=3)}, "accumulation"),
    "held-out shards that are learned from": (lambda s: {"val": str(s / "train.tar")}, r"train\.tar is a training shard too"),
    "no such shards": (lambda s: {"data": str(s / "none-{000000..000003}.tar")}, "none-000000.tar"),
    "no such optimizer": (lambda _: {"optim": OptimSettings(name="adamv")}, "adamv"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_before_anything_is_written(case: str, tiny_shards: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=message) as refused:
        run(tiny(tiny_shards, **changes(tiny_shards)), reporter=Reporter(), out=tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "some_px"), [("spatial", 18), ("dense", 38)])
def test_a_run_stops_at_the_first_line_of_its_log_if_nothing_counts(name: str, some_px: int, tiny_shards: Path, tmp_path: Path) -> None:
    usual = tiny(tiny_shards).with_objectives(dense=DenseSpatialSettings(size_px=24, regions=4, min_side_px=4))
    usual = dataclasses.replace(usual, runtime=dataclasses.replace(usual.runtime, log_every=2))
    too_much = dataclasses.replace(usual.objectives[name], min_side_px=97)  # all pictures are smaller
    with pytest.raises(ValueError, match="counts") as stopped:
        run(usual.with_objectives(**{name: too_much}), reporter=Reporter(), out=tmp_path / "run")
    message = str(stopped.value)
    assert message.startswith(f"{name}: not a pair of the last 16 pictures counts, ")
    assert (f"{name}.min_side_px" in message, "train.tar" in message, "\n" in message) == (True, True, False)
    assert [record["update"] for record in read_metrics(RunFolder(tmp_path / "run"), "train")] == [2]
    # control: some pairs are enough
    some = dataclasses.replace(usual.objectives[name], min_side_px=some_px)
    run(usual.with_objectives(**{name: some}), reporter=Reporter(), out=tmp_path / "some")
    shares = [record["meters"][f"{name}/pairs_left_out"] for record in read_metrics(RunFolder(tmp_path / "some"), "train")]
    assert all(0 < share < 1 for share in shares)


def test_small_pictures_that_meet_by_chance_stop_no_run(
    make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path
) -> None:
    sides = [90, 20] * 4
    pictures = [jpeg_bytes(np.full((side, side, 3), side, np.uint8)) for side in sides]
    make_shard(tmp_path / "train.tar", [(f"{number}", {"jpg": picture}) for number, picture in enumerate(pictures)])
    settings = tiny(tmp_path, updates=len(sides), global_batch=1, seed=0)
    settings = settings.with_objectives(spatial=dataclasses.replace(settings.objectives["spatial"], min_side_px=8))
    reporter = _Lines()
    run(settings, reporter=reporter, out=tmp_path / "run")
    shares = [record["meters"]["spatial/pairs_left_out"] for record in read_metrics(RunFolder(tmp_path / "run"), "train")]
    assert (shares[0], sorted(shares)) == (0, [0] * 4 + [1] * 4)
    lines = [line for line in reporter.lines if "not a pair" in line]
    assert lines == ["spatial: not a pair of the last 1 pictures counts, all are too small for the law; see spatial.min_side_px"] * 4


def test_another_runs_folder_is_refused_unless_it_goes_on(finished: Path, tiny_shards: Path, tmp_path: Path) -> None:
    settings = tiny(tiny_shards)
    with pytest.raises(ValueError, match="holds another run; go on with it by --resume"):
        run(settings, reporter=Reporter(), out=finished)
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="is not empty"):
            run(settings, reporter=Reporter(), out=tmp_path, resume=resume)
    with pytest.raises(ValueError, match="is a file"):
        run(settings, reporter=Reporter(), out=tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="resume without out"):
        run(settings, reporter=Reporter(), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_checkpoint_of_another_run_is_refused_by_the_field_that_differs(finished: Path, tiny_shards: Path) -> None:
    settings = tiny(tiny_shards)
    others = {
        "seed=5": dataclasses.replace(settings, seed=5),
        "global_batch=4": dataclasses.replace(settings, global_batch=4),
        "recipe='imagenette_sp'": dataclasses.replace(settings, recipe="imagenette_sp"),
        "model.depth=2": dataclasses.replace(settings, model=dataclasses.replace(settings.model, depth=2)),
        "spatial.views=2": settings.with_objectives(spatial=dataclasses.replace(settings.objectives["spatial"], views=2)),
        "dataset=": dataclasses.replace(settings, data=str(tiny_shards / "val.tar")),
    }
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    for field, other in others.items():
        with pytest.raises(ValueError, match=field):
            run(other, reporter=Reporter(), out=finished, resume=True)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_without_out_the_next_free_number_is_taken(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        assert run(tiny(tiny_shards, updates=1), reporter=Reporter()).folder == Path("runs") / f"demo-{number}"


@pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))
def test_every_picture_is_decoded_once_where_that_saves_a_run_more(tiny_shards: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    little = SpatialSettings(law=Paired(), views=2, size_px=24, color=None, min_side_px=4)
    run_of = partial(dataclasses.replace, tiny(shards, updates=500, objectives={"spatial": little}))
    native = RuntimeSettings(device="cpu", renderer="native")
    one_process: Any = SimpleNamespace(is_local_main_process=True, device=torch.device("cpu"))

    class Hears(Reporter):
        def message(self, line: str) -> None:
            said.append(line)

    def audits(settings: TrainSettings) -> bool:
        said.clear()
        index, _ = _open_data(settings, one_process, Ranks(0, 1), Hears())
        assert bool(said) == index.audited and index.decodable.all() == index.audited
        return index.audited

    said: list[str] = []
    assert not audits(run_of(runtime=native, index=IndexSettings(decode="never")))
    assert not audits(run_of(runtime=native, updates=20))  # each picture is seen four times
    assert not audits(run_of(runtime=dataclasses.replace(native, renderer="torch")))  # decodes whole pictures
    much = dataclasses.replace(little, law=Independent(area_frac=(0.9, 1.0)))
    assert not audits(run_of(runtime=native, objectives={"spatial": much}))
    assert audits(run_of(runtime=native))
    assert "--index.decode never" in said[0]


def test_only_the_newest_checkpoints_are_kept_whatever_a_kill_left(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, OptimSettings())
    folder = tmp_path / "checkpoints"

    def saved(update: int) -> None:
        state = checkpoint.State(update=update, settings={}, position={}, unlogged=[], seconds={})
        checkpoint.save(folder, state, model, optimizer, keep=2)

    for update in (1, 2, 3):
        saved(update)
    # a kill between two renamings: complete, and not in `latest`; another amid writing, another amid removing
    for name in ("update-00000009", "update-00000004", checkpoint.WRITING, checkpoint.REMOVING):
        (folder / name).mkdir()
        (folder / name / "half").touch()
    newest = checkpoint.latest(folder)
    assert newest is not None
    assert newest.name == "update-00000003"
    saved(4)
    assert sorted(path.name for path in folder.glob("update-*")) == ["update-00000003", "update-00000004"]
    assert checkpoint.read_state(folder / "update-00000004").update == 4


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "update-00000001").mkdir()
    (tmp_path / checkpoint.LATEST).write_text("update-00000001\n")
    with pytest.raises(ValueError, match="which is not there"):
        checkpoint.latest(tmp_path)
    state = tmp_path / "update-00000001" / "state.json"
    for text, message in (
        ('{"format": 1', "damaged"),
        ('{"format": 99}', "of format 99"),
        ("[]", "damaged"),
        (f'{{"format": {checkpoint.FORMAT}}}', "damaged"),
    ):
        state.write_text(text)
        with pytest.raises(ValueError, match=message):
            checkpoint.read_state(tmp_path / "update-00000001")


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt"])
def test_tensors_of_a_checkpoint_are_refused_where_cut_short_or_changed(name: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, OptimSettings())
    state = checkpoint.State(update=1, settings={}, position={}, unlogged=[], seconds={})
    saved = checkpoint.save(tmp_path / "checkpoints", state, model, optimizer, keep=1)
    checkpoint.load(saved, model, optimizer)  # whole as it was saved
    whole = (saved / name).read_bytes()
    head_lost = bytes(len(whole) // 4) + whole[len(whole) // 4 :]
    one_bit = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], head_lost, bytes(len(whole)), one_bit):
        (saved / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}: damaged \(.*\); go back to an older checkpoint"):
            checkpoint.load(saved, model, optimizer)
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        checkpoint.load(saved, model, optimizer)
