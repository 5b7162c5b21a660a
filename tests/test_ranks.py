"""Two processes that share every batch over gloo, against one that has it whole: the same samples, views and losses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.views import Batch
from wherefrom.train import checkpoint, loop
from wherefrom.train import objective as objective_module
from wherefrom.train.encoder import Encoder
from wherefrom.train.loop import accelerator_for
from wherefrom.train.objective import Encode, Progress, Terms
from wherefrom.train.objectives import SpatialPrediction
from wherefrom.train.ranks import Ranks
from wherefrom.train.recipes import recipe
from wherefrom.train.replay import replayed_batch
from wherefrom.train.reporting import Reporter
from wherefrom.train.run_folder import RunFolder, read_metrics
from wherefrom.train.settings import TrainSettings, read_settings, write_settings
from wherefrom.train.trainer import Trainer

SETTINGS = """
data: {data}
global_batch: 8
updates: 10
model: {{view_size_px: 24, patch_size_px: 12, width: 32, depth: 1, heads: 2}}
spatial: {{views: 3, size_px: 24, min_side_px: 4}}
runtime: {{device: cpu, renderer: torch, threads: 1, prefetch: 1, accumulation: {accumulation}}}
"""

ROTATED_RESNET = """
data: {data}
global_batch: 8
updates: 10
model: {{name: resnet10t}}
objectives: {{rotation: {{size_px: 32}}}}
optim: {{name: sgd, lr: 0.01}}
runtime: {{device: cpu, renderer: torch, threads: 1, prefetch: 1, accumulation: {accumulation}}}
"""


class Late(SpatialPrediction):
    """Learn from the second update on; before, no gradient reaches its head."""

    awake = False

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        terms = super().forward(batch, encode, progress)
        return terms if self.awake else replace(terms, losses={name: value.detach() for name, value in terms.losses.items()})

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        self.awake = True


def rest(folder: Path, updates: int) -> None:
    """Make updates with an objective beside that rests at first; write down its head's weights after each."""
    settings = read_settings(folder / "settings.yaml", recipe("demo"))
    spatial = settings.objectives["spatial"]
    late = Late(spatial, name="late")
    TrainSettings.make_objectives = lambda settings: (SpatialPrediction(spatial), late)  # type: ignore[method-assign]
    accelerator = accelerator_for(settings)
    trainer = Trainer(settings, ShardIndex.open(settings.data), accelerator)
    sums = []
    for _ in range(updates):
        trainer.update()
        sums.append(sum(parameter.double().sum().item() for parameter in late.parameters()))
    trainer.close()
    (folder / f"observed.{accelerator.process_index}").write_text(json.dumps({"unreached": trainer.unreached_parameters, "sums": sums}))
    accelerator.end_training()


def watch(folder: Path, updates: int) -> None:
    """Make the first updates of a run as the rank that the environment says, and write down what this rank saw."""
    settings = read_settings(folder / "settings.yaml", recipe("demo"))
    accelerator = accelerator_for(settings)
    assert settings.data is not None
    trainer = Trainer(settings, ShardIndex.open(settings.data), accelerator)
    deliver, batches = trainer.loader.forever, []

    def watched() -> Iterator[Batch]:
        for batch in deliver():
            views = batch.views[0]
            batches.append((batch.sample.tolist(), views.geometry.boxes.tolist(), views.pixels.double().sum().item()))
            yield batch

    trainer.loader.forever = watched  # type: ignore[method-assign]
    rows = []
    for _ in range(updates):
        trainer.update()
        rows.append(trainer.window.take())
    trainer.close()
    weights = {name: tensor.double().abs().sum().item() for name, tensor in trainer.step.state_dict().items()}
    texts = [trainer.ranks.texts(text) for text in ("", "grüße " * trainer.ranks.rank)]
    observed = {"batches": batches[: updates * settings.runtime.accumulation], "rows": rows, "weights": weights, "texts": texts}
    (folder / f"observed.{accelerator.process_index}").write_text(json.dumps(observed))
    accelerator.end_training()


def watch_by_themselves(folder: Path, updates: int) -> None:
    """Do as `watch`, with BatchNorm of each rank by itself."""
    objective_module.batch_norm_over_ranks = lambda module: module
    watch(folder, updates)


def open_late(folder: Path, updates: int) -> None:
    """Open a run's data, the first rank later than the default group would wait; write down what came of it, and of that group."""
    settings = read_settings(folder / "settings.yaml", recipe("demo"))
    accelerator = accelerator_for(settings)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes)
    ranks.wait()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))

    def late(*words: Any, **options: Any) -> ShardIndex:
        time.sleep(3 if ranks.first else 0)
        return ShardIndex.open(*words, **options)

    loop.ShardIndex = SimpleNamespace(open=late)  # type: ignore[assignment, misc]
    index, _ = loop._open_data(settings, accelerator, ranks, Reporter())
    lost = False
    if ranks.first:
        time.sleep(3)
    else:
        try:
            dist.barrier()
        except RuntimeError:
            lost = True
    (folder / f"observed.{ranks.rank}").write_text(json.dumps({"pictures": len(index), "lost patience": lost}))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def written(folder: Path, accumulation: int, shards: Path, settings: str = SETTINGS) -> Path:
    """Make a folder with the settings of a run in it."""
    folder.mkdir()
    (folder / "settings.yaml").write_text(settings.format(data=shards / "train.tar", accumulation=accumulation))
    return folder


def run_alone(shards: Path, folder: Path, updates: int, settings: str = SETTINGS) -> dict[str, Any]:
    """Return what one process, this one, observes."""
    watch(written(folder, 1, shards, settings), updates)
    return json.loads((folder / "observed.0").read_text())


def run_ranks(
    ranks: int, accumulation: int, shards: Path, folder: Path, updates: int, *, work: str = "watch", settings: str = SETTINGS
) -> list[dict[str, Any]]:
    """Return what every one of `ranks` processes observed at `work`, each started with the environment that torchrun gives it."""
    written(folder, accumulation, shards, settings)
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, work, str(folder), str(updates)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        _, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint.decode()[-2000:]
    return [json.loads((folder / f"observed.{rank}").read_text()) for rank in range(ranks)]


def assert_ranks_agree(alone: dict[str, Any], ranks: list[dict[str, Any]], *, micro: int, updates: int) -> None:
    """Compare one process that saw whole batches with ranks that saw `micro` micro-batches of each."""
    for update in range(updates):
        samples, boxes, pixels = alone["batches"][update]
        parts = [rank["batches"][update * micro + number] for rank in ranks for number in range(micro)]
        assert [sample for part in parts for sample in part[0]] == samples
        assert [box for part in parts for box in part[1]] == boxes
        assert sum(part[2] for part in parts) == pytest.approx(pixels, rel=1e-9, abs=1e-6)
        for rank in ranks:
            assert rank["rows"][update]["loss"] == pytest.approx(alone["rows"][update]["loss"], abs=1e-5)
            assert rank["rows"][update]["gradient:spatial"] == pytest.approx(alone["rows"][update]["gradient:spatial"], rel=1e-3)
    for rank in ranks:
        # a key's bias changes no attention: its gradient is rounding, which Adam makes a step of
        felt = [name for name in alone["weights"] if not name.endswith("qkv.bias")]
        assert [rank["weights"][name] for name in felt] == pytest.approx([alone["weights"][name] for name in felt], rel=1e-4)
        assert rank["weights"] == ranks[0]["weights"]
        assert rank["texts"] == [[""] * len(ranks), ["grüße " * number for number in range(len(ranks))]]


def assert_replayed(folder: Path, ranks: list[dict[str, Any]], *, updates: int) -> None:
    """Hold batches that are replayed from the settings alone to what the ranks saw, each its part of them in their order."""
    write_settings(folder / "settings.yaml", read_settings(folder / "settings.yaml", recipe("demo")))
    for update in range(updates):
        batch, each = replayed_batch(folder, update + 1), 8 // len(ranks)
        for rank, observed in enumerate(ranks):
            views = batch[rank * each : (rank + 1) * each].views[0]
            samples, boxes, pixels = observed["batches"][update]
            assert (views.geometry.sample.tolist(), views.geometry.boxes.tolist()) == (samples, boxes)
            assert views.pixels.double().sum().item() == pytest.approx(pixels, rel=1e-12)


@pytest.mark.core
def test_two_ranks_see_the_batches_of_one_and_agree_on_the_loss(tiny_shards: Path, tmp_path: Path) -> None:
    alone = run_alone(tiny_shards, tmp_path / "one", updates=6)
    two = run_ranks(2, 1, tiny_shards, tmp_path / "two", updates=6)
    assert_ranks_agree(alone, two, micro=1, updates=6)
    assert_replayed(tmp_path / "two", two, updates=6)
    # control: ranks in the wrong order, and another update's loss, are seen
    with pytest.raises(AssertionError):
        assert_ranks_agree(alone, two[::-1], micro=1, updates=6)
    assert abs(alone["rows"][0]["loss"] - alone["rows"][1]["loss"]) > 1e-4


@pytest.mark.core
def test_a_resnet_normalizes_over_ranks_under_a_method_without_negatives(tiny_shards: Path, tmp_path: Path) -> None:
    alone = run_alone(tiny_shards, tmp_path / "one", 2, ROTATED_RESNET)
    means = [name for name in alone["weights"] if name.endswith("running_mean")]
    apart = {}
    for work in ("watch", "watch_by_themselves"):
        ranks = run_ranks(2, 1, tiny_shards, tmp_path / work, 2, work=work, settings=ROTATED_RESNET)
        apart[work] = [abs(rank["rows"][0]["loss"] - alone["rows"][0]["loss"]) for rank in ranks]
        apart[work].append(max(abs(ranks[0]["weights"][name] - ranks[1]["weights"][name]) for name in means))
        apart[work].append(max(abs(ranks[0]["weights"][name] - alone["weights"][name]) for name in means))
    assert max(apart["watch"]) < 1e-3, apart
    # control: each rank by itself
    assert min(apart["watch_by_themselves"]) > 1e-2, apart


@pytest.mark.core
def test_ranks_wait_for_an_index_longer_than_for_gradients(tiny_shards: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, 1, tiny_shards, tmp_path / "late", 0, work="open_late")
    assert first["pictures"] == second["pictures"] > 0
    assert second["lost patience"]  # control: where gradients are exchanged


@pytest.mark.slow
def test_ranks_do_not_wait_for_the_gradient_of_what_rests(tiny_shards: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, 2, tiny_shards, tmp_path / "rests", updates=4, work="rest")
    assert first == second
    assert first["unreached"]
    resting, *learning = first["sums"]
    assert len({resting, *learning}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 2), (4, 1), (4, 2)])
def test_any_split_of_the_batch_gives_the_same_losses(ranks: int, accumulation: int, tiny_shards: Path, tmp_path: Path) -> None:
    alone = run_alone(tiny_shards, tmp_path / "one", updates=10)
    split = run_ranks(ranks, accumulation, tiny_shards, tmp_path / "split", updates=10)
    assert_ranks_agree(alone, split, micro=accumulation, updates=10)


@pytest.mark.slow
def test_a_signal_to_any_rank_stops_them_all_after_the_same_update(tiny_shards: Path, tmp_path: Path) -> None:
    folder, out = written(tmp_path / "run", 1, tiny_shards), tmp_path / "run" / "out"
    words = ["train", "--config", str(folder / "settings.yaml"), "--out", str(out), "--updates", "2000", "--runtime.log-every", "1"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "wherefrom.tools.cli", *words],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    until = time.monotonic() + 120
    while not read_metrics(RunFolder(out), "train"):
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGUSR1)
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGUSR1, complaint.decode()[-2000:]
    newest = checkpoint.latest(RunFolder(out).checkpoints)
    assert newest is not None
    assert checkpoint.read_state(newest).update == read_metrics(RunFolder(out), "train")[-1]["update"] < 2000


if __name__ == "__main__":
    works = {work.__name__: work for work in (watch, watch_by_themselves, rest, open_late)}
    works[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
