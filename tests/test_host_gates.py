"""What every registered objective must hold as a host, one table-driven test a promise; a new method is a row of METHODS.

Compared bit for bit on one machine where nothing else computes: runs that were killed, hosts with and without a plug-in. Within 1e-5: ranks
and micro-batches, which add up otherwise (without drop-path, whose masks are keyed by both). Each promise has a control in which it breaks.
Plain pytest runs two methods, those of the turn that WHEREFROM_GATES_TURN numbers, and -m slow all others: `.ci/run` takes turns.
"""

import dataclasses
import json
import os
import random
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import Rows, be_a_rank, in_processes, run_until_killed, updates_of
from safetensors.torch import load_file
from torch import Tensor

from wherefrom.pipeline import Disjoint
from wherefrom.train import (
    OBJECTIVES,
    DenseSpatialSettings,
    EvaluationSettings,
    MAESettings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    Reporter,
    RunFolder,
    RuntimeSettings,
    SpatialSettings,
    TrainSettings,
    checkpoint,
    run,
)
from wherefrom.train.meters import LOSS
from wherefrom.train.run_folder import read_metrics

VIT = ModelSettings(view_size_px=24, patch_size_px=6, width=32, depth=2, heads=2, drop_path=0.3)
SINCOS = dataclasses.replace(VIT, positions="sincos")
SP = SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16)), views=3, size_px=24, min_side_px=4, color=None, weight=1.0)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method at a size that takes a second or so: 8 pictures an update, 5 updates an epoch."""

    settings: ObjectiveSettings
    model: ModelSettings = VIT
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-3))


METHODS = {
    "mae": Method(settings=MAESettings(size_px=24, decoder_width=16, decoder_depth=1, decoder_heads=2), model=SINCOS),
    "spatial": Method(settings=SP),
    "dense": Method(settings=DenseSpatialSettings(size_px=24, regions=4, min_side_px=4, color=None, weight=1.0)),
}

TURN = int(os.environ.get("WHEREFROM_GATES_TURN", "0"))
NAMES = list(METHODS)
QUICK = {NAMES[(2 * TURN + number) % len(NAMES)] for number in (0, 1)}

each_method = pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES])


def method_run(name: str, shards: Path, *, plugin: SpatialSettings | None = None, **changes: Any) -> TrainSettings:
    """Return the settings of a short run of a method, alone or with SP beside it; `changes` are of the run, its model or its runtime."""
    method = METHODS[name]
    of_model, of_runtime = (
        {key: changes.pop(key) for key in tuple(changes) if key in {each.name for each in dataclasses.fields(kind)}}
        for kind in (ModelSettings, RuntimeSettings)
    )
    runtime = RuntimeSettings(device="cpu", renderer="torch", threads=1, log_every=1, checkpoint_every=3, log_with="none")
    return dataclasses.replace(
        TrainSettings(
            recipe="demo",
            data=str(shards / "train.tar"),
            global_batch=8,
            updates=4,
            model=dataclasses.replace(method.model, **of_model),
            objectives={name: method.settings} | ({} if plugin is None else {"plugin": plugin}),
            optim=dataclasses.replace(method.optim, warmup_frac=0.5),
            evaluation=EvaluationSettings(every=0),
            runtime=dataclasses.replace(runtime, **of_runtime),
        ),
        **changes,
    )


def furthest(ours: Rows, theirs: Rows) -> float:
    """Return the largest difference of any number of any update, of the larger, or of 1 where that is more."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    pairs = [(row[name], other[name]) for row, other in zip(ours, theirs, strict=True) for name in row]
    return max(abs(a - b) / max(abs(a), abs(b), 1) for a, b in pairs)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# The table


@pytest.mark.core
def test_every_objective_has_a_row_and_two_are_quick() -> None:
    assert set(METHODS) == set(OBJECTIVES.own)
    assert len(QUICK) == 2


# Resume


def ended(out: Path) -> tuple[list[Any], Mapping[str, Tensor], dict[str, Any]]:
    """Return what a run logged, without speeds, the weights that it ends with, and the optimizer's memory."""
    newest = checkpoint.latest(RunFolder(out).checkpoints)
    assert newest is not None
    logged = [[line[key] for key in ("update", "losses", "meters", "gradients", "lr")] for line in read_metrics(RunFolder(out), "train")]
    return logged, load_file(newest / "weights.safetensors"), torch.load(newest / "optimizer.pt", weights_only=True)["state"]


def differ(ours: Path, theirs: Path) -> list[str]:
    """Return in what two runs differ in a single bit."""
    (logged, weights, memory), (logged_2, weights_2, memory_2) = ended(ours), ended(theirs)
    assert weights.keys() == weights_2.keys() and memory.keys() == memory_2.keys()
    found = ["log"] if logged != logged_2 else []
    found += [name for name in weights if not torch.equal(weights[name], weights_2[name])]
    return found + [f"memory {of}" for of, held in memory.items() if any(not torch.equal(held[key], memory_2[of][key]) for key in held)]


@each_method
def test_killed_inside_the_warm_up_and_at_a_random_step_a_run_goes_on_bit_for_bit(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    settings = method_run(name, tiny_shards, updates=14)  # 7 of warm-up, checkpoints every 3
    chance = random.Random(time.time_ns())
    in_warmup, later = chance.randrange(4, 7), chance.randrange(7, 14)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run(settings, reporter=Reporter(), out=whole)
    for at in (in_warmup, later):
        assert in_processes(run_until_killed, [(settings, out, at)]) == [-signal.SIGKILL]
        newest = checkpoint.latest(RunFolder(out).checkpoints)
        assert newest is not None and checkpoint.read_state(newest).update == at - at % 3
    run(settings, reporter=Reporter(), out=out, resume=True)
    assert differ(out, whole) == [], (in_warmup, later)

    run(dataclasses.replace(settings, seed=1), reporter=Reporter(), out=tmp_path / "other")
    assert len(differ(tmp_path / "other", whole)) > 1  # control


# Ranks and micro-batches


@each_method
def test_two_ranks_are_one_process(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    settings = method_run(name, tiny_shards, drop_path=0.0)
    rows, state = updates_of(settings)
    port = free_port()
    assert in_processes(be_a_rank, [(settings, tmp_path, rank, port) for rank in (0, 1)]) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert furthest(first["rows"], rows) < 1e-5
    assert first["sums"].keys() == state.keys()
    assert furthest(rows[1:], rows[:-1]) > 1e-3  # control: another update's


@each_method
def test_micro_batches_change_nothing_or_belong_to_the_run(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    settings = method_run(name, tiny_shards, drop_path=0.0)
    (host,) = settings.make_objectives()
    if host.couples_samples:
        run(dataclasses.replace(settings, updates=2), reporter=Reporter(), out=tmp_path / "run")
        parted = method_run(name, tiny_shards, drop_path=0.0, updates=2, accumulation=2)
        with pytest.raises(ValueError, match=rf"^runtime\.accumulation=2: the run to go on with has 1, and in '{name}'"):
            run(parted, reporter=Reporter(), out=tmp_path / "run", resume=True)
        return
    rows, _ = updates_of(settings)
    for accumulation in (2, 4):
        parts, _ = updates_of(method_run(name, tiny_shards, drop_path=0.0, accumulation=accumulation))
        assert furthest(parts, rows) < 1e-5
    other, _ = updates_of(method_run(name, tiny_shards, drop_path=0.0, seed=1))
    assert furthest(other, rows) > 1e-3  # control


# Plug-ins


def host_differs(accompanied: tuple[Rows, dict[str, Tensor]], alone: tuple[Rows, dict[str, Tensor]]) -> bool:
    """Whether anything that the host owns, its losses or its gradient differs in a single bit."""
    ours = [{key: row[key] for key in theirs if key != LOSS} for row, theirs in zip(accompanied[0], alone[0], strict=True)]
    theirs = [{key: value for key, value in row.items() if key != LOSS} for row in alone[0]]
    return ours != theirs or any(not torch.equal(accompanied[1][key], held) for key, held in alone[1].items())


@each_method
def test_a_plugin_of_weight_0_is_absent_and_one_without_gradient_leaves_the_host_as_it_is(name: str, tiny_shards: Path) -> None:
    alone = updates_of(method_run(name, tiny_shards))
    for plugin in (dataclasses.replace(SP, weight=0.0), dataclasses.replace(SP, stop="encoder")):
        assert not host_differs(updates_of(method_run(name, tiny_shards, plugin=plugin)), alone)
    assert host_differs(updates_of(method_run(name, tiny_shards, plugin=SP, updates=2)), (alone[0][:2], alone[1]))  # control


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_leaves_a_compiled_host_as_it_is(name: str, tiny_shards: Path) -> None:
    alone = updates_of(method_run(name, tiny_shards, compile=True))
    for plugin in (dataclasses.replace(SP, weight=0.0), dataclasses.replace(SP, stop="encoder")):
        assert not host_differs(updates_of(method_run(name, tiny_shards, plugin=plugin, compile=True)), alone)


# Precision and compile


@each_method
def test_a_run_in_bfloat16_is_the_same_but_for_rounding(name: str, tiny_shards: Path) -> None:
    assert_rounded(name, tiny_shards, compile=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_run_in_bfloat16_is_the_same_but_for_rounding(name: str, tiny_shards: Path) -> None:
    assert_rounded(name, tiny_shards, compile=True)


def assert_rounded(name: str, shards: Path, *, compile: bool) -> None:
    """Compare a run with one in float32; another seed's is further off than rounding."""
    plain, _ = updates_of(method_run(name, shards, updates=2))
    rounded, other = (
        updates_of(method_run(name, shards, updates=2, precision="bfloat16", compile=compile, seed=seed))[0] for seed in (0, 1)
    )
    assert 0 < furthest(rounded, plain) < 0.1
    assert furthest(other, plain) > furthest(rounded, plain)
