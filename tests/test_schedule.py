"""The learning rate over a run, against its definition: rises to the peak, falls to the end, and has no memory."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherefrom.train.schedule import Shape, cosine, ramp, warmed_up

pytestmark = pytest.mark.core

RUNS = st.integers(2, 5000).flatmap(lambda updates: st.tuples(st.just(updates), st.integers(0, updates - 1)))


@given(run=RUNS, peak=st.floats(1e-6, 10.0), final=st.floats(0, 1), shape=st.sampled_from(["cosine", "constant"]))
def test_peak_is_reached_once_the_warm_up_is_over(run: tuple[int, int], peak: float, final: float, shape: Shape) -> None:
    updates, warmup = run
    value = warmed_up(warmup, updates=updates, peak=peak, warmup=warmup, final=final * peak, shape=shape)
    assert value == pytest.approx(peak, rel=1e-12)


@given(run=RUNS, final=st.floats(0, 1))
def test_it_rises_in_the_warm_up_and_never_rises_after_it(run: tuple[int, int], final: float) -> None:
    updates, warmup = run
    values = [warmed_up(update, updates=updates, peak=1.0, warmup=warmup, final=final) for update in range(updates)]
    steps = [after - before for before, after in itertools.pairwise(values)]
    assert all(step > 0 for step in steps[:warmup])
    assert all(step <= 0 for step in steps[warmup:])
    assert min(values) > 0 or (final == 0 and values.index(min(values)) == updates - 1)
    if warmup < updates - 1:
        assert values[-1] == pytest.approx(final, abs=1e-12)


def test_half_way_down_the_cosine_is_the_mean_of_both_ends() -> None:
    assert warmed_up(60, updates=101, peak=3.0, warmup=20, final=1.0) == pytest.approx(2.0)
    assert warmed_up(40, updates=101, peak=3.0, warmup=20, final=1.0) == pytest.approx(1 + 2 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize(("update", "warmup"), [(-1, 0), (11, 0), (0, 10), (0, -1)])
def test_what_lies_outside_the_run_is_refused(update: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <="):
        warmed_up(update, updates=10, peak=1.0, warmup=warmup)


@given(run=RUNS, shape=st.sampled_from(["cosine", "constant"]))
def test_after_the_last_update_the_rate_is_as_at_it(run: tuple[int, int], shape: Shape) -> None:
    updates, warmup = run
    last, after = (warmed_up(at, updates=updates, peak=2.0, warmup=warmup, final=0.5, shape=shape) for at in (updates - 1, updates))
    assert after == pytest.approx(last if warmup < updates - 1 or shape == "constant" else 0.5)


@given(updates=st.integers(1, 3000), start=st.floats(0, 1), end=st.floats(0, 1))
def test_a_cosine_goes_from_end_to_end_by_way_of_the_mean(updates: int, start: float, end: float) -> None:
    values = [cosine(update, updates=updates, start=start, end=end) for update in range(updates + 1)]
    assert (values[0], values[-1]) == pytest.approx((start, end), abs=1e-12)
    steps = [(after - before) * (1 if end >= start else -1) for before, after in itertools.pairwise(values)]
    assert min(steps) >= -1e-12
    assert values[updates // 2] == pytest.approx((start + end) / 2, abs=1e-12) or updates % 2


def test_a_cosine_is_that_of_dino_and_moco_v3() -> None:
    """Figures of cosine_scheduler(.04, .4, 5, 4) of facebookresearch/dino 04c0ad9 and adjust_moco_momentum of moco-v3 1c6b717."""
    assert cosine(7, updates=20, start=0.04, end=0.4) == pytest.approx(0.138282, abs=1e-6)
    assert cosine(7, updates=20, start=0.99, end=1.0) == pytest.approx(0.992730, abs=1e-6)
    with pytest.raises(ValueError, match="update=21: needs 0 <= update <= updates=20"):
        cosine(21, updates=20, start=0, end=1)


def test_a_ramp_is_straight_and_stays_at_its_end() -> None:
    assert [ramp(at, over=4, start=0.04, end=0.08) for at in (0, 1, 4, 9)] == pytest.approx([0.04, 0.05, 0.08, 0.08])
    assert ramp(0, over=0, start=0.04, end=0.08) == 0.08
