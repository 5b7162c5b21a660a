"""What every registered objective must hold as a host, one table-driven test a promise; a new method is a row of METHODS
in host_runs.py.

Compared bit for bit on one machine where nothing else computes: runs that were killed, hosts with and without a plug-in. Within 1e-5: ranks
and micro-batches, which add up otherwise: in float64, and without drop-path, whose masks are keyed by both. Each promise has a control in
which it breaks. Plain pytest runs two methods, those of the turn that WHEREFROM_GATES_TURN numbers, and -m slow all others: `.ci/run` takes
turns.
"""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import (
    ABSENT,
    METHODS,
    SP,
    STOPPED,
    Rows,
    be_a_rank,
    host_of,
    in_float64,
    in_processes,
    method_run,
    observed,
    run_until_killed,
    trainer_of,
    updates_of,
)
from safetensors.torch import load_file
from torch import Tensor

from wherefrom.train import OBJECTIVES, Reporter, RunFolder, TrainSettings, checkpoint, run
from wherefrom.train.meters import GRADIENT, LOSS
from wherefrom.train.run_folder import read_metrics

TURN = int(os.environ.get("WHEREFROM_GATES_TURN", "0"))
NAMES = list(METHODS)
QUICK = {NAMES[(2 * TURN + number) % len(NAMES)] for number in (0, 1)}

each_method = pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES])


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
    assert {host_of(name) for name in METHODS} == set(OBJECTIVES.own)
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

    run(replace(settings, seed=1), reporter=Reporter(), out=tmp_path / "other")
    assert len(differ(tmp_path / "other", whole)) > 1  # control


# Ranks and micro-batches


@each_method
def test_two_ranks_are_one_process(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    """In float64, for in float32 what the order of sums rounds off grows a hundredfold an update by BatchNorm over 8 pictures."""
    settings = method_run(name, tiny_shards, drop_path=0.0)
    alone = observed(settings, precise=True)
    port = free_port()
    assert in_processes(be_a_rank, [(settings, tmp_path, rank, port, True) for rank in (0, 1)]) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert first["sums"].keys() == alone["sums"].keys()
    assert furthest(first["rows"], alone["rows"]) < 1e-5
    assert first["first in float32"] == pytest.approx(alone["first in float32"], rel=1e-5)
    assert furthest(alone["rows"][1:], alone["rows"][:-1]) > 1e-3  # control: another update's


@pytest.mark.parametrize("head", ["attend", pytest.param("additive", marks=pytest.mark.slow)])
def test_two_ranks_are_one_process_where_pairs_are_left_out(head: Any, tiny_shards: Path, tmp_path: Path) -> None:
    settings = method_run("spatial", tiny_shards, drop_path=0.0, updates=2)
    settings = settings.with_objectives(spatial=replace(SP, head=head, min_side_px=16))
    with trainer_of(settings) as trainer:
        of_ranks = next(trainer.loader.forever()).views[0].valid.unflatten(0, (2, -1)).flatten(1).sum(1).tolist()
    assert of_ranks[0] != of_ranks[1], of_ranks  # or nothing is told
    alone = observed(settings, precise=False)
    port = free_port()
    assert in_processes(be_a_rank, [(settings, tmp_path, rank, port, False) for rank in (0, 1)]) == [0, 0]
    assert furthest(json.loads((tmp_path / "rank.0").read_text())["rows"], alone["rows"]) < 1e-5


@each_method
def test_micro_batches_change_nothing_or_belong_to_the_run(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    (host,) = method_run(name, tiny_shards).make_objectives()
    if host.couples_samples:
        assert_refused_with_other_micro_batches(name, tiny_shards, tmp_path / "run")
        return
    rows, *parted, other = (
        updates_in_float64(method_run(name, tiny_shards, drop_path=0.0, accumulation=parts, seed=seed))
        for parts, seed in ((1, 0), (2, 0), (4, 0), (1, 1))
    )
    assert max(furthest(parts, rows) for parts in parted) < 1e-5
    assert furthest(other, rows) > 1e-3  # control


def assert_refused_with_other_micro_batches(name: str, shards: Path, out: Path) -> None:
    """Raise AssertionError unless a run goes on with as many micro-batches alone, and others would change it."""
    whole, parted = (method_run(name, shards, drop_path=0.0, updates=1, accumulation=parts) for parts in (1, 2))
    assert furthest(updates_in_float64(parted), updates_in_float64(whole)) > 1e-3
    run(whole, reporter=Reporter(), out=out)
    with pytest.raises(ValueError, match=rf"^runtime\.accumulation=2: the run to go on with has 1, and in '{host_of(name)}'"):
        run(parted, reporter=Reporter(), out=out, resume=True)


def updates_in_float64(settings: TrainSettings) -> Rows:
    with in_float64():
        return updates_of(settings)[0]


# Plug-ins


def host_differs(accompanied: tuple[Rows, dict[str, Tensor]], alone: tuple[Rows, dict[str, Tensor]]) -> bool:
    """Whether anything that the host owns, its losses or its gradient differs in a single bit."""
    ours = [{key: row[key] for key in theirs if key != LOSS} for row, theirs in zip(accompanied[0], alone[0], strict=True)]
    theirs = [{key: value for key, value in row.items() if key != LOSS} for row in alone[0]]
    return ours != theirs or any(not torch.equal(accompanied[1][key], held) for key, held in alone[1].items())


@each_method
def test_a_plugin_of_weight_0_is_absent_and_one_without_gradient_leaves_the_host_as_it_is(name: str, tiny_shards: Path) -> None:
    alone = updates_of(method_run(name, tiny_shards))
    for plugin in (ABSENT, STOPPED):
        assert not host_differs(updates_of(method_run(name, tiny_shards, plugins=[plugin])), alone)
    assert host_differs(updates_of(method_run(name, tiny_shards, plugins=[SP])), alone)  # control


# Precision and compile


@each_method
def test_a_run_in_bfloat16_is_the_same_but_for_rounding(name: str, tiny_shards: Path) -> None:
    rounded = updates_of(method_run(name, tiny_shards, updates=2, precision="bfloat16"))
    assert_rounded(rounded[0], name, tiny_shards)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name == host_of(name)])
def test_a_compiled_run_in_bfloat16_is_the_same_but_for_rounding_and_plugins_leave_it_as_it_is(name: str, tiny_shards: Path) -> None:
    alone, accompanied = (
        updates_of(method_run(name, tiny_shards, plugins=plugins, updates=2, precision="bfloat16", compile=True))
        for plugins in ((), (ABSENT, STOPPED))
    )
    assert_rounded(alone[0], name, tiny_shards)
    assert not host_differs(accompanied, alone)


def assert_rounded(rounded: Rows, name: str, shards: Path) -> None:
    """Raise AssertionError unless losses are those of float32 but for rounding, and another seed's are further off.

    Not gradients, whose norm BatchNorm over 8 pictures moves by up to a sixth.
    """
    plain, other = (updates_of(method_run(name, shards, updates=2, seed=seed))[0] for seed in (0, 1))
    off, other_off = (furthest(_losses(rows), _losses(plain)) for rows in (rounded, other))
    assert 0 < off < min(0.1, other_off)


def _losses(rows: Rows) -> Rows:
    return [{key: value for key, value in row.items() if not key.startswith(GRADIENT)} for row in rows]
