"""What limits a run and what a change gives, by arithmetic: worked examples with planted costs, against numbers done by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest

from wherefrom.train.throughput import (
    LINKS,
    Chain,
    batch_change,
    calibrated,
    disk_change,
    gpu_changes,
    judge,
    limit_of,
    log_change,
    machine_changes,
    one_math_thread_change,
    order_change,
    packing_change,
    picture_size_change,
    rates,
    renderer_changes,
    thread_changes,
    views_change,
)

pytestmark = pytest.mark.core

# a GPU that trains 2000 pictures/s, and eight cores that make 8 / 4 ms = 2000 of them, less what the host takes
GPU = Chain(
    read_s=1e-4,
    read_cpu_s=1e-4,
    draw_s=1e-4,
    decode_s=2e-3,
    render_s=1e-3,
    hand_over_s=1e-4,
    batch=200,
    copy_s=0.005,
    forward_s=0.025,
    backward_s=0.06,
    optimizer_s=0.01,
    host_s=0.05,
    device="cuda",
    cores=16,
    cores_seen=16,
    threads=16,
)
# two cores that do both: 8 ms a picture of training, 2 ms of the loader
CPU = Chain(
    read_s=1e-4,
    draw_s=1e-4,
    decode_s=1.2e-3,
    render_s=0.7e-3,
    batch=10,
    forward_s=0.03,
    backward_s=0.045,
    optimizer_s=0.005,
    device="cpu",
    cores=2,
    cores_seen=2,
    threads=2,
)


def with_costs(chain: Chain, **changes: Any) -> Chain:
    return replace(chain, **changes)


def test_a_loader_with_room_is_hidden_behind_a_gpu() -> None:
    got = rates(GPU)
    assert got.ceiling == pytest.approx(200 / 0.1)
    assert got.loader == pytest.approx(2 / (3e-4 + 3e-3 / 16))  # two makers, each of which waits for its batch
    assert got.reached == pytest.approx(2000)
    assert got.hidden_frac == 1.0
    assert limit_of(GPU) == ("training", None)


def test_a_loader_that_is_slower_than_the_gpu_sets_the_rate() -> None:
    starved = with_costs(GPU, cores=4, cores_seen=4, threads=4)
    got = rates(starved)
    assert got.reached == pytest.approx(4 / (3.3e-3 + 0.05 / 200))  # the host of the GPU takes its part of the cores
    assert limit_of(starved) == ("decoding", None)
    exposed_s = 1 / got.reached - 1 / 2000
    assert got.exposed_frac == pytest.approx(exposed_s * got.loader)
    assert judge(starved).cores_needed == pytest.approx(2000 * (3.3e-3 + 0.05 / 200))


def test_on_processors_loader_and_training_share_the_cores() -> None:
    got = rates(CPU)
    assert got.ceiling == pytest.approx(2 / 8e-3)
    assert got.reached == pytest.approx(2 / (8e-3 + 2e-3))  # no more: nothing hides where all compute
    assert got.hidden_frac == pytest.approx(0.0, abs=0.06)
    apart = rates(with_costs(CPU, device="cuda", forward_s=0.04 - 0.005, backward_s=0.0))
    assert apart.reached == pytest.approx(apart.ceiling)  # the same times, of another device: the loader is hidden


def test_what_does_not_run_in_parallel_gains_nothing_from_cores() -> None:
    half = with_costs(CPU, parallel_frac=0.5)
    assert rates(half).ceiling == pytest.approx(10 / (0.08 * (0.5 + 0.25)))
    assert rates(with_costs(half, cores=1, cores_seen=1)).ceiling == pytest.approx(10 / 0.08)
    assert rates(with_costs(half, held=1.5)).ceiling == pytest.approx(10 / 0.08 * 0.5)  # half a core


def test_without_threads_nothing_is_hidden() -> None:
    alone = with_costs(GPU, threads=0)
    assert 1 / rates(alone).reached == pytest.approx(0.1 / 200 + 3.3e-3)
    assert rates(alone).hidden_frac == pytest.approx(0.0)


def test_a_batch_that_waits_for_the_disk_holds_its_maker() -> None:
    slow = with_costs(GPU, read_s=4e-3)
    pool_s = 3e-3 / 16
    assert rates(slow).loader == pytest.approx(2 / (4e-3 + 1e-4 + 1e-4 + pool_s))
    assert rates(with_costs(slow, makers=1)).loader == pytest.approx(1 / (4e-3 + 1e-4 + 1e-4 + pool_s))


def test_logs_are_hidden_by_nothing() -> None:
    assert 1 / rates(with_costs(GPU, log_s=0.1)).reached == pytest.approx(2 * 0.1 / 200)


@pytest.mark.parametrize("chain", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    ("planted", "changes"),
    [
        ("reading", {"read_s": 0.05}),
        ("reading", {"read_s": 0.05, "loose": True}),
        ("drawing", {"draw_s": 0.05}),
        ("decoding", {"decode_s": 0.08}),
        ("rendering", {"render_s": 0.08}),
        ("handing over", {"hand_over_s": 0.05}),
        ("copying", {"copy_s": 1.0}),
        ("training", {"forward_s": 1.0}),
        ("training", {"optimizer_s": 1.0}),
        ("collectives", {"collectives_s": 1.0}),
        ("logging", {"log_s": 1.0}),
        ("cores", {"cores": 1, "cores_seen": 16, "threads": 1}),
        ("neighbors", {"cores": 2, "cores_seen": 2, "threads": 2, "held": 1.5}),
    ],
)
def test_a_planted_limit_is_named(chain: Chain, planted: str, changes: dict[str, Any]) -> None:
    assert limit_of(with_costs(chain, **changes))[0] == planted


def test_the_limit_beneath_a_busy_machine_is_named_too() -> None:
    assert limit_of(with_costs(CPU, held=1.0)) == ("neighbors", "training")
    assert limit_of(with_costs(CPU, held=0.1)) == ("training", None)  # it costs too little
    stored = with_costs(GPU, read_s=0.05, held=8.0)
    assert limit_of(stored) == ("reading", None)  # with all cores it would be no faster


def test_what_a_change_gives_is_what_its_chain_gives() -> None:
    starved = with_costs(GPU, cores=8, cores_seen=8, threads=2)
    found = {change.what: change.rate for change in judge(starved, thread_changes(starved)).changes}
    assert found["--runtime.threads 1"] == pytest.approx(1 / 3e-3)
    assert found["--runtime.threads 4"] == pytest.approx(4 / 3e-3)
    assert found["--runtime.threads 8"] == pytest.approx(2000)  # the ceiling
    (renderer,) = judge(starved, renderer_changes(starved, {"native": (1e-3, 0.5e-3)})).changes
    assert renderer.rate == pytest.approx(2 / 1.5e-3)
    (views,) = judge(CPU, [views_change(CPU, "half", 0.5)]).changes
    assert views.rate == pytest.approx(2 / (0.5 * 7.5e-3 + 0.5e-3 + 1.3e-3 + 0.35e-3))
    (views,) = judge(CPU, [views_change(CPU, "half", 0.5, fixed_s=0.025)]).changes
    assert views.rate == pytest.approx(2 / (5e-3 + 0.5e-3 + 1.3e-3 + 0.35e-3))
    (batch,) = judge(CPU, [batch_change(CPU, 2, fixed_s=0.025)]).changes
    assert batch.rate == pytest.approx(2 / ((0.025 + 0.05 * 2 + 0.005) / 20 + 2e-3))
    (smaller,) = judge(starved, [picture_size_change(starved, 256, 0.25)]).changes
    assert smaller.rate == pytest.approx(2 / (0.5e-3 + 1e-3))


def test_smaller_pictures_are_read_faster_by_their_bytes_alone() -> None:
    stored = with_costs(GPU, read_s=0.04)
    latency = picture_size_change(stored, 256, 0.25, per_byte_frac=0.0).chain
    bandwidth = picture_size_change(stored, 256, 0.25).chain
    assert (latency.read_s, bandwidth.read_s) == pytest.approx((0.04, 0.01))


def test_predictions_are_corrected_by_what_was_measured() -> None:
    verdict = judge(CPU, machine_changes(CPU), reached=0.8 * rates(CPU).reached)
    assert verdict.factor == pytest.approx(0.8)
    (double,) = verdict.changes
    assert double.what == "4 cores like these"
    assert double.rate == pytest.approx(0.8 * 4 / 10e-3)
    rated = judge(CPU, gpu_changes(CPU, flop=1e12), reached=0.8 * rates(CPU).reached).changes
    assert {change.basis for change in rated} == {"rated"}
    assert max(change.rate for change in rated) == pytest.approx(2 / 2e-3)  # the loader's, whose cores are its own now; not corrected


def test_what_others_cost_beyond_their_time_ends_with_them() -> None:
    busy = with_costs(CPU, held=1.0)
    alone, more = judge(busy, machine_changes(busy), reached=0.8 * rates(busy).reached).changes
    assert (alone.what, more.what) == ("no other programs", "4 cores like these")
    assert alone.rate == pytest.approx(rates(CPU).reached)
    assert more.rate == pytest.approx(0.8 * rates(more.chain).reached)


def test_a_link_that_waits_is_held_to_what_was_measured() -> None:
    stored = with_costs(GPU, read_s=0.05)
    slower = calibrated(stored, rates(stored).reached / 1.5)
    assert slower.read_s == pytest.approx(0.075, rel=0.02)
    assert rates(slower).reached == pytest.approx(rates(stored).reached / 1.5)
    disk = judge(slower, [disk_change(slower, 1000)], reached=rates(slower).reached)
    assert disk.changes[0].rate == pytest.approx(2000)  # what the GPU gives is not corrected by what the disk takes
    assert calibrated(CPU, 1.0) == CPU


def test_gpus_are_compared_by_what_is_rated() -> None:
    (hopper,) = (change for change in gpu_changes(GPU, flop=0.0, now_tflops=312) if change.what.endswith("H100"))
    assert hopper.chain.forward_s == pytest.approx(0.025 * 312 / 989)
    assert hopper.chain.optimizer_s == GPU.optimizer_s  # memory's matter


def test_the_first_thing_to_change_leaves_the_run_as_it_is_where_that_gives_enough() -> None:
    starved = with_costs(GPU, cores=8, cores_seen=8, threads=2)
    everything = [
        *thread_changes(starved),
        *renderer_changes(starved, {"native": (1.0e-3, 0.9e-3)}),
        views_change(starved, "half", 0.5),
        *machine_changes(starved),
    ]
    first = judge(starved, everything).first
    assert first is not None
    assert first.what == "--runtime.threads 8"
    busy = with_costs(CPU, held=1.0)
    first = judge(busy, [*machine_changes(busy), *gpu_changes(busy, flop=1e12)]).first
    assert first is not None
    assert first.what == "no other programs"
    logs = with_costs(CPU, log_s=1.0)
    first = judge(logs, [log_change(logs, 10, 50)]).first
    assert first is not None
    assert first.what == "--runtime.log-every 500"
    files = with_costs(GPU, read_s=0.05, loose=True)
    first = judge(files, [packing_change(files, 1e-4), order_change(files, 1e-3), disk_change(files, 10)]).first
    assert first is not None
    assert first.what == "wherefrom pack, then tars"


def test_training_in_one_thread_is_advised_where_to_share_it_takes_longer() -> None:
    tiny = with_costs(CPU, parallel_frac=0.5)  # 8 ms a picture on two cores, 6 ms by the clock
    alone = one_math_thread_change(tiny, 3e-3)
    assert alone.chain.update_s == pytest.approx(0.03)
    first = judge(tiny, [alone, *machine_changes(tiny)]).first
    assert first is not None
    assert first.what == "OMP_NUM_THREADS=1"
    shared_well = one_math_thread_change(CPU, 8e-3)
    assert judge(CPU, [shared_well]).first is None


def test_nothing_is_advised_that_gives_nothing() -> None:
    assert judge(GPU, [*thread_changes(GPU), order_change(GPU, 1e-5), views_change(GPU, "half", 0.5)]).first is None


def test_costs_that_cannot_be_are_refused_in_one_line() -> None:
    for changes in ({"read_s": -1.0}, {"decode_s": math.nan}, {"batch": 0}, {"threads": -1}, {"cores": 0}):
        with pytest.raises(ValueError, match=r"^[^\n]*needs[^\n]*$"):
            with_costs(CPU, **changes)


def test_every_cost_of_a_chain_is_of_a_link() -> None:
    of_links = {cost for costs in LINKS.values() for cost in costs}
    assert of_links == {name for name in Chain.__dataclass_fields__ if name.endswith("_s")} - {"host_s"}
