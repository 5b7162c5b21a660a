"""The loader: the same records however it runs, against records drawn for one sample alone; pixels against another run's, bit for bit."""

import ctypes
import gc
import itertools
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wherefrom.pipeline.laws import Disjoint, Independent, Paired
from wherefrom.pipeline.loader import Loader, TooManyBadError, make_loader
from wherefrom.pipeline.order import Order
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render import slots
from wherefrom.pipeline.render.choose import make_renderer
from wherefrom.pipeline.render.dali_decode import dali_missing
from wherefrom.pipeline.render.renderer import Rendered
from wherefrom.pipeline.render.slots import SlotRing
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch, Photometric, Record, Views

PAIR = ViewFamily(name="pair", views=2, size_px=(24, 24), law=Paired(), mirror="picture", min_side_px=4)
LOCAL = ViewFamily(
    name="local", views=3, size_px=(16, 20), mirror="view", turns=True, color=ColorLaw(blur_prob=0.5, solarize_prob=0.2), min_side_px=8
)
RECIPE = ViewRecipe(families=(PAIR, LOCAL))
BATCH = 12
Records = dict[tuple[int, int], tuple[NDArray, ...]]  # (epoch, drawn_for) -> every number of its record


@pytest.fixture
def build(tiny_shards: Path) -> Iterator[Callable[..., Loader]]:
    """Builds loaders over 56 pictures in two shards, closed at the end."""
    built: list[Loader] = []

    def make(recipe: ViewRecipe = RECIPE, **settings: Any) -> Loader:
        given = {"seed": 7, "global_batch": BATCH, "renderer": "torch", "threads": 0} | settings
        index = given.pop("index", None) or ShardIndex.open(str(tiny_shards))
        built.append(make_loader(index, recipe, **given))
        return built[-1]

    yield make
    for loader in built:
        loader.close()


def record_of(views: Views, position: int) -> tuple[NDArray, ...]:
    """Every number of one sample's record."""
    geometry, color = views.geometry, views.photometric
    numbers = [
        getattr(geometry, name)[position] for name in ("boxes", "flipped", "quarter_turns", "source_size", "stored_orientation", "sample")
    ]
    return tuple(
        tensor.numpy()
        for tensor in [*numbers, views.valid[position], *(getattr(color, item.name)[position] for item in fields(Photometric))]
    )


def records_of(batches: Iterable[Batch], names: tuple[str, ...] = ("pair", "local")) -> Records:
    """The records of batches by epoch and sample, all families joined."""
    return {
        (batch.views[0].geometry.epoch, int(batch.drawn_for[b])): tuple(
            number for name in names for number in record_of(batch.family(name), b)
        )
        for batch in batches
        for b in range(len(batch))
    }


def assert_same_records(one: Records, other: Records) -> None:
    """Raise unless both hold records of the same samples, some, all equal."""
    assert one and one.keys() == other.keys()
    for key, numbers in one.items():
        for a, b in zip(numbers, other[key], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=str(key))


def assert_same_pixels(one: Batch, other: Batch) -> None:
    """Raise unless two batches show the same samples, bit for bit."""
    assert torch.equal(one.sample, other.sample) and torch.equal(one.drawn_for, other.drawn_for)
    for a, b in zip(one.views, other.views, strict=True):
        assert torch.equal(a.pixels, b.pixels)


def clone(batch: Batch) -> Batch:
    """A copy of a batch in memory of its own."""
    return replace(batch, views=tuple(replace(views, pixels=views.pixels.clone()) for views in batch.views))


@pytest.mark.core
def test_a_loader_and_its_index_show_what_they_hold_in_a_line(build: Callable[..., Loader], tiny_shards: Path) -> None:
    loader = build(global_batch=8, accumulation=2)
    loader.seek(10)
    views = "'pair' (B, 2, 3, 24, 24), 'local' (B, 3, 3, 16, 20) float32"
    shown = f"Loader(56 samples, shuffled, epoch 1, step 3 of 7; B = 4 of 8 samples, rank 0 of 1; {views}; torch renderer, cpu)"
    assert repr(loader) == shown
    loader.close()
    assert repr(loader) == shown[:-1] + ", closed)"
    digits = loader.index.fingerprint[:8]
    assert repr(loader.index) == f"ShardIndex(56 samples, 0 invalid, of '{tiny_shards}/train.tar' and 1 more, fingerprint {digits})"
    loader.index.mark_invalid(3, "to see")
    assert repr(loader.index).startswith("ShardIndex(56 samples, 1 invalid, of ")


@pytest.mark.core
def test_a_record_is_what_is_drawn_for_its_sample_alone(build: Callable[..., Loader]) -> None:
    loader = build()
    loader.seek(loader.updates_per_epoch + 1)
    batch = next(iter(loader))
    for b in (0, 5, BATCH - 1):
        sample = batch.sample[b : b + 1].numpy()
        drawn = draw_records(RECIPE, seed=7, epoch=1, drawn_for=sample, source_size=loader.index.source_size[sample])
        for views, alone in zip(batch.views, drawn, strict=True):
            for name in ("boxes", "flipped", "quarter_turns", "source_size"):
                assert torch.equal(getattr(views.geometry, name)[b], getattr(alone.geometry, name)[0])
            assert torch.equal(views.valid[b], alone.valid[0]) and torch.equal(views.photometric.hue_rad[b], alone.photometric.hue_rad[0])


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1), (4, 3)])
def test_ranks_threads_and_accumulation_change_nothing(build: Callable[..., Loader], threads: int, ranks: int, accumulation: int) -> None:
    whole = [clone(batch) for batch in build()]
    parts = [list(build(threads=threads, rank=rank, ranks=ranks, accumulation=accumulation)) for rank in range(ranks)]
    assert_same_records(records_of(whole), records_of(itertools.chain(*parts)))
    for step, batch in enumerate(whole):
        mine = [part for of_rank in parts for part in of_rank[step * accumulation : (step + 1) * accumulation]]
        assert torch.cat([part.sample for part in mine]).tolist() == batch.sample.tolist()
        for k, views in enumerate(batch.views):
            assert torch.equal(torch.cat([part.views[k].pixels for part in mine]), views.pixels)


def test_block_order_of_a_single_window_is_said_to_shuffle_all(
    build: Callable[..., Loader], tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    picture = jpeg_bytes(np.zeros((20, 20, 3), np.uint8))
    for number in range(9):
        make_shard(tmp_path / f"{number}.tar", [(f"s{number}", {"jpg": picture})])
    several, few = ShardIndex.open(tmp_path), ShardIndex.open(f"{tmp_path}/{{0..7}}.tar")
    for order in ("shuffled", "block", "block"):
        for index in (several, few):
            build(index=index, order=order, global_batch=4)
        said = [[note for note in index.notes if 'order="block"' in note] for index in (several, few)]
        assert [len(notes) for notes in said] == [0, order == "block"]
    assert said[1][0].startswith('order="block" mixes all 8 samples at once, as "shuffled" does, for they lie in 8 shards or folders')


@pytest.mark.core
@pytest.mark.parametrize("order", ["shuffled", "block", "sequential"])
@pytest.mark.parametrize("batch", [1, 5, 56])
def test_the_batch_size_changes_no_view(build: Callable[..., Loader], order: str, batch: int) -> None:
    one = build(order=order)
    found = {int(i): other[b : b + 1] for other in build(order=order, global_batch=batch, threads=2) for b, i in enumerate(other.sample)}
    for each in one:
        for b, i in enumerate(each.sample.tolist()):
            if i in found:  # not among the dropped remainder
                assert_same_pixels(each[b], found[i])
                assert_same_records(records_of([each[b]]), records_of([found[i]]))
    assert len(found) == 56 // batch * batch if order != "sequential" else 56


@pytest.mark.core
@pytest.mark.skipif(dali_missing() is not None, reason="DALI is not installed")
def test_both_renderers_are_handed_the_same_records(build: Callable[..., Loader]) -> None:
    torch_batches = list(build())
    dali = [build(renderer="dali", rank=rank, ranks=2, threads=1) for rank in range(2)]
    assert_same_records(records_of(torch_batches), records_of(itertools.chain(*dali)))


@pytest.mark.core
@pytest.mark.parametrize("threads", [0, 2])
def test_how_many_batches_are_drawn_at_once_changes_nothing(
    build: Callable[..., Loader], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for samples in (1, 2 * BATCH, 512):
        monkeypatch.setattr("wherefrom.pipeline.loader.DRAWN_AT_ONCE", samples)
        loader = build(threads=threads)
        seen.append([clone(batch) for batch in itertools.islice(loader.forever(), 2 * loader.updates_per_epoch + 1)])
    for others in seen[1:]:
        assert_same_records(records_of(seen[0]), records_of(others))
        for one, other in zip(seen[0], others, strict=True):
            assert_same_pixels(one, other)


@pytest.mark.core
def test_what_is_marked_invalid_is_replaced_from_the_next_batch_on(build: Callable[..., Loader]) -> None:
    loader, expected = build(), list(build())
    batches = iter(loader)
    next(batches)
    marked = int(expected[1].sample[2])
    loader.index.mark_invalid(marked, "a label that is wrong")
    batch = next(batches)
    assert marked not in batch.sample.tolist() and marked in batch.drawn_for.tolist()
    replayed = loader.batch(batch.sample, batch.drawn_for)
    assert_same_records(records_of([batch]), records_of([replayed]))
    assert_same_pixels(batch, replayed)


def test_other_families_change_nothing(build: Callable[..., Loader]) -> None:
    other = ViewFamily(name="other", views=4, size_px=(8, 8), law=Disjoint(), mirror="view", min_side_px=4)
    for alone, more in zip(build(), build(ViewRecipe(families=(other, PAIR, LOCAL))), strict=True):
        assert_same_records(records_of([alone]), records_of([more]))
        for name in ("pair", "local"):
            assert torch.equal(alone.family(name).pixels, more.family(name).pixels)


@pytest.mark.core
@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_at_any_step_continues_the_same_views(build: Callable[..., Loader], threads: int) -> None:
    per_epoch = build().updates_per_epoch
    through = [clone(batch) for batch in itertools.islice(build(threads=threads).forever(), 2 * per_epoch + 1)]
    assert {batch.views[0].geometry.epoch for batch in through} == {0, 1, 2}
    for updates in range(2 * per_epoch):
        loader = build(threads=threads)
        loader.resume(json.loads(json.dumps(build().position(updates))))
        for expected, batch in zip(through[updates : updates + 2], loader.forever(), strict=False):
            assert_same_pixels(expected, batch)
            assert_same_records(records_of([expected]), records_of([batch]))


def test_an_epoch_ends_where_the_next_begins(build: Callable[..., Loader]) -> None:
    loader = build(accumulation=2)
    assert len(loader) == 2 * loader.updates_per_epoch == 2 * (56 // BATCH)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader)
    assert loader.position()["updates"] == 2 * loader.updates_per_epoch
    assert [batch.views[0].geometry.epoch for batch in (first[0], second[0])] == [0, 1]
    loader.seek(loader.updates_per_epoch - 1)
    assert len(loader) == 2
    assert len(list(loader)) == 2
    assert len(loader) == 2 * loader.updates_per_epoch
    with pytest.raises(ValueError, match="updates=-1: needs 0 or more"):
        loader.seek(-1)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_pass_that_is_broken_off_is_followed_by_the_next_epoch(build: Callable[..., Loader], threads: int) -> None:
    loader = build(threads=threads)
    for epoch, taken in enumerate((1, loader.updates_per_epoch, 2)):
        seen = list(itertools.islice(loader, taken))
        assert [batch.sample.tolist() for batch in seen] == [loader.order.micro_batch(epoch, step, 0).tolist() for step in range(taken)]
    loader.seek(1)
    assert next(iter(loader)).sample.tolist() == loader.order.micro_batch(0, 1, 0).tolist()


@pytest.mark.parametrize("wrong", [True, 1.5, -1, "3", np.int64(2)])
def test_a_position_is_a_whole_number_of_steps_or_refused(build: Callable[..., Loader], wrong: Any) -> None:
    loader = build(threads=0)
    here = loader.position()
    for refused in (lambda: loader.position(wrong), lambda: loader.seek(wrong), lambda: loader.resume(here | {"updates": wrong})):
        with pytest.raises(ValueError, match=r"updates=.*: needs (a whole number|0 or more)"):
            refused()
    assert loader.position() == here


@pytest.mark.core
@pytest.mark.parametrize("form", [Path, str, lambda path: [path], lambda path: (str(path / "train.tar"), path / "val.tar")])
def test_shards_are_named_as_for_the_index(tiny_shards: Path, form: Callable[[Path], Any]) -> None:
    with make_loader(form(tiny_shards), RECIPE, global_batch=4, renderer="torch", threads=0) as loader:
        assert loader.index.fingerprint == ShardIndex.open(str(tiny_shards)).fingerprint
        assert len(next(iter(loader))) == 4


def test_ranks_draw_independently() -> None:
    """Flips and boxes of two ranks' i-th slots over many steps; keyed by the slot instead of the sample they are equal."""
    count, size = 20_000, np.array([480, 640], np.int32)
    orders = [Order(samples=count, global_batch=200, rank=rank, ranks=2) for rank in range(2)]
    ids = [np.concatenate([order.micro_batch(0, step, 0) for step in range(100)]) for order in orders]
    recipe = ViewRecipe(families=(replace(LOCAL, law=Independent()),))

    def drawn(keys: NDArray[np.int64]) -> NDArray[np.float64]:
        record = draw_records(recipe, seed=0, epoch=0, drawn_for=keys, source_size=np.broadcast_to(size, (len(keys), 2)).copy())[0].geometry
        return np.concatenate([record.flipped.numpy(), record.quarter_turns.numpy(), record.boxes.flatten(1).numpy()], 1).astype(np.float64)

    one, two = (drawn(keys) for keys in ids)
    columns = one.shape[1]
    between = np.corrcoef(one.T, two.T)[:columns, columns:]
    assert np.abs(between).max() < 4.5 / np.sqrt(len(one))
    by_slot = [drawn(np.arange(len(keys))) for keys in ids]
    assert np.corrcoef(by_slot[0][:, 0], by_slot[1][:, 0])[0, 1] == pytest.approx(1)


@pytest.mark.core
@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("recipe", {"recipe": ViewRecipe(families=(PAIR,))}),
        ("seed", {"seed": 8}),
        ("global_batch", {"global_batch": 6}),
        ("order", {"order": "block"}),
    ],
)
def test_a_position_of_another_run_is_refused_by_name(build: Callable[..., Loader], field: str, other: dict[str, Any]) -> None:
    position = build().position(3)
    loader = build(**other)
    with pytest.raises(ValueError, match=f"position has {field}=.*resume with the same {field}") as caught:
        loader.resume(position)
    assert "\n" not in str(caught.value) and loader.position()["updates"] == 0


def test_a_position_of_another_dataset_is_refused_by_name(build: Callable[..., Loader], tiny_shards: Path) -> None:
    loader = build(index=ShardIndex.open(str(tiny_shards / "train.tar")))
    with pytest.raises(ValueError, match="position has dataset="):
        loader.resume(build().position())
    position = build().position()
    del position["seed"]
    with pytest.raises(ValueError, match="position lacks 'seed'"):
        build().resume(position)
    for wrong in ("3", 3.0, True):
        with pytest.raises(ValueError, match=f"updates={wrong!r}: needs a whole number"):
            build().resume(build().position() | {"updates": wrong})
    for nothing in (None, "position.json", 3):
        with pytest.raises(ValueError, match=f"^position={nothing!r}: needs the dict that `position` returned$"):
            build().resume(nothing)


def test_a_position_may_be_resumed_by_other_numbers_of_ranks_and_threads(build: Callable[..., Loader]) -> None:
    loader = build(rank=1, ranks=2, accumulation=3, threads=2)
    loader.resume(build().position(2))
    assert next(iter(loader)).sample.tolist() == build().order.micro_batch(0, 2, 0)[6:8].tolist()


@pytest.mark.core
@pytest.mark.parametrize("threads", [0, 2])
def test_five_kept_batches_equal_five_fresh_ones(build: Callable[..., Loader], threads: int) -> None:
    kept = list(itertools.islice(build(threads=threads, global_batch=4).forever(), 9))
    for step, batch in enumerate(kept):
        fresh = build(global_batch=4)
        fresh.seek(step)
        assert_same_pixels(batch, next(fresh.forever()))


def test_a_ring_that_takes_slots_back_too_early_is_found(build: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""

    def finalize_at_once(_: object, give_back: Callable[[Any], None], memory: torch.Tensor) -> SimpleNamespace:
        give_back(memory)
        return SimpleNamespace()

    monkeypatch.setattr(slots, "weakref", SimpleNamespace(finalize=finalize_at_once))
    kept = list(itertools.islice(build(global_batch=4).forever(), 3))
    fresh = next(build(global_batch=4).forever())
    with pytest.raises(AssertionError):
        assert_same_pixels(kept[0], fresh)


def test_a_slot_comes_back_when_the_last_tensor_over_it_is_gone() -> None:
    ring = SlotRing(2)
    first = ring.take([(3, 5), (7,)], torch.float32)
    place = first[0].untyped_storage().data_ptr()
    part = first[1][2:4].view(2, 1)
    array = part.numpy()
    del first, part
    other = ring.take([(3, 5), (7,)], torch.float32)
    assert ring.slots == 2 and other[0].untyped_storage().data_ptr() != place
    del array  # an array made from a tensor made from the slot
    again = ring.take([(3, 5), (7,)], torch.float32)
    assert ring.slots == 2 and again[0].untyped_storage().data_ptr() == place
    assert again[0].shape == (3, 5) and again[1].shape == (7,) and again[1].data_ptr() % 64 == 0


def test_a_ring_grows_while_all_its_slots_are_held_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    ring = SlotRing(2)
    with caplog.at_level("INFO"):
        held = [ring.take([(100,)], torch.uint8) for _ in range(5)]
    assert ring.slots == 5 and len(caplog.records) == 1 and "ring grows" in caplog.text
    for number, (tensor,) in enumerate(held):
        tensor.fill_(number)
    assert [int(tensor[0]) for (tensor,) in held] == list(range(5))
    held.clear()
    for size in (100, 50, 100, 200, 100):  # smaller ones fit, larger ones are made anew
        ring.take([(size,)], torch.uint8)
    assert ring.slots <= 5


def test_a_ring_lets_go_of_what_a_caller_kept_and_dropped() -> None:
    ring = SlotRing(3)
    held = [ring.take([(100,)], torch.uint8) for _ in range(40)]
    held[5:] = []
    again = ring.take([(100,)], torch.uint8)
    assert ring.slots == len(ring._free) + 6 == 3 + 5
    del again
    held.clear()
    watched = [weakref.ref(memory) for memory in ring._free]
    del held
    for _ in range(5):
        ring.take([(100,)], torch.uint8)
    assert ring.slots == len(ring._free) == 3
    assert sum(memory() is not None for memory in watched) == 3


def test_threads_that_share_a_ring_count_its_slots() -> None:
    ring = SlotRing(2)

    def use(_: int) -> None:
        for held in (1, 12, 3, 7):
            kept = [ring.take([(100,)], torch.uint8) for _ in range(held)]
            del kept

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(100)))
    ring.take([(100,)], torch.uint8)
    assert ring.slots == len(ring._free) <= 3


@pytest.mark.parametrize("threads", [0, 2])
def test_dropped_batches_need_no_more_slots_than_expected(build: Callable[..., Loader], threads: int) -> None:
    loader = build(global_batch=4, threads=threads)
    for _ in itertools.islice(loader.forever(), 40):
        pass
    ring = loader.renderer.ring
    assert ring.slots <= ring.expected


def undecodable(jpeg: bytes) -> bytes:
    """A JPEG whose header, lengths and end marker are valid, and whose quantization table is not the one that its frame asks for."""
    table = jpeg.index(b"\xff\xdb") + 4
    return jpeg[:table] + b"\x03" + jpeg[table + 1 :]


@pytest.fixture
def with_bad(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> Path:
    """20 pictures, of which 3, 4, 11 and 19 will not decode, and 7 is invalid by its header: its end marker is missing."""
    rng = np.random.default_rng(1)
    samples = []
    for i in range(20):
        jpeg = jpeg_bytes(rng.integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8))
        content = undecodable(jpeg) if i in (3, 4, 11, 19) else jpeg[:-2] if i == 7 else jpeg
        samples.append((f"s{i:02d}", {"jpg": content, "cls": str(i).encode()}))
    return make_shard(tmp_path / "bad.tar", samples)


STANDS_IN = {3: 5, 4: 5, 7: 8, 11: 12, 19: 0}


@pytest.mark.core
@pytest.mark.parametrize("threads", [0, 2])
def test_what_will_not_decode_is_replaced_by_the_next_valid_picture(
    with_bad: Path, cpu_renderer: str, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    index = ShardIndex.open(str(with_bad))
    assert index.invalid_count == 1  # the header tells no more
    clean = ViewRecipe(families=(replace(LOCAL, color=None),))
    with make_loader(index, clean, global_batch=5, order="sequential", renderer=cpu_renderer, threads=threads) as loader:
        batches = [clone(batch) for batch in loader]
        shown = {int(d): int(s) for batch in batches for s, d in zip(batch.sample, batch.drawn_for, strict=True)}
        assert shown == {i: STANDS_IN.get(i, i) for i in range(20)}
        assert torch.cat([batch.label for batch in batches]).tolist() == list(shown.values())
        stats = loader.stats()
        assert (stats.pictures, stats.replaced) == (20, 5)
        assert caplog.text.count("will not decode and is replaced") == 4 and "bad.tar:s11" in caplog.text
        assert [entry.id for entry in index.quarantine()] == [3, 4, 7, 11, 19] and len(index) == 20

        for batch in batches:  # the draws are the wanted sample's own, at the shown picture's size; the pixels are the shown picture's
            drawn = draw_records(
                clean, seed=0, epoch=0, drawn_for=batch.drawn_for.numpy(), source_size=index.source_size[batch.sample.numpy()]
            )
            assert torch.equal(batch.views[0].geometry.boxes, drawn[0].geometry.boxes)
            assert torch.equal(batch.source_size, torch.from_numpy(index.source_size[batch.sample.numpy()]))
            assert_same_pixels(batch, loader.batch(batch.sample, batch.drawn_for))
        again = list(loader)  # known now, and replaced before decoding
        assert [batch.sample.tolist() for batch in again] == [batch.sample.tolist() for batch in batches]
        assert caplog.text.count("will not decode and is replaced") == 4


class Lenient:
    """The torch renderer, said to show damaged pictures as a GPU's decoders do."""

    name, strict = "lenient", False

    def __init__(self, recipe: ViewRecipe) -> None:
        self.inner = make_renderer(recipe, "torch", threads=0)

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[Record]) -> Rendered:
        return self.inner.render(encoded, records)

    def close(self) -> None:
        self.inner.close()


def plain_loader(index: ShardIndex, *, lenient: bool = False) -> Loader:
    order = Order(samples=len(index), global_batch=5, mode="sequential")
    renderer = Lenient(RECIPE) if lenient else make_renderer(RECIPE, "torch", threads=0)
    return Loader(index, RECIPE, order, renderer, threads=0)


def test_an_audit_changes_neither_what_a_strict_renderer_shows_nor_its_position(with_bad: Path) -> None:
    before, audited = ShardIndex.open(str(with_bad)), ShardIndex.open(str(with_bad), decode=True)
    assert (before.invalid_count, audited.invalid_count) == (1, 5)
    with plain_loader(before) as one, plain_loader(audited) as other:
        assert one.position(3) == other.position(3)
        ids = list(range(20))
        assert_same_pixels(one.batch(ids), other.batch(ids))
        assert one.batch(ids).sample.tolist() == [STANDS_IN.get(i, i) for i in ids]
        assert one.position(3) == other.position(3)  # what was found on the way changes nothing either
        other.resume(json.loads(json.dumps(one.position(2))))
        one.resume(other.position(1))


def test_a_position_under_other_verdicts_is_refused_by_name(with_bad: Path) -> None:
    position = plain_loader(ShardIndex.open(str(with_bad)), lenient=True).position(1)
    strict = plain_loader(ShardIndex.open(str(with_bad)))
    small = plain_loader(ShardIndex.open(str(with_bad), max_pixels=2000))
    with pytest.raises(ValueError, match=r"position has invalid=.* resume with the same max_pixels, and the shards audited") as caught:
        small.resume(strict.position(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="position has decoding='lenient', this loader has 'strict'; resume with a renderer"):
        strict.resume(position)
    audited = ShardIndex.open(str(with_bad), decode=True)
    with pytest.raises(ValueError, match="position has decoding='lenient'"):
        plain_loader(audited, lenient=True).resume(position)
    plain_loader(audited, lenient=True).resume(strict.position(1))  # the audit's verdicts are the strict renderer's own


def test_a_position_of_0_1_0_is_refused_by_name(with_bad: Path) -> None:
    loader = plain_loader(ShardIndex.open(str(with_bad)))
    position = loader.position(1)
    position["unsound"] = position.pop("invalid")
    with pytest.raises(ValueError, match="position lacks 'invalid'; it was not written by this version of the library"):
        loader.resume(position)


def test_where_every_picture_decodes_an_audit_between_stop_and_resume_changes_nothing(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    picture = jpeg_bytes(np.zeros((40, 40, 3), np.uint8))
    shard = make_shard(tmp_path / "s.tar", [(f"s{i}", {"jpg": picture if i else picture[:-2]}) for i in range(6)])
    positions = [plain_loader(ShardIndex.open(str(shard)), lenient=lenient).position(1) for lenient in (True, False)]
    audited = ShardIndex.open(str(shard), decode=True)
    for lenient in (True, False):
        for position in positions:
            plain_loader(audited, lenient=lenient).resume(position)


def test_a_lenient_renderer_without_decode_verdicts_is_said_once(with_bad: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = ShardIndex.open(str(with_bad))
    for _ in range(2):  # as an evaluation makes loaders of its own
        with plain_loader(index, lenient=True) as loader:
            loader.batch([0, 1])
            loader.batch([5, 6])
    assert caplog.text.count("wherefrom index PATTERN --decode") == 1
    caplog.clear()
    plain_loader(ShardIndex.open(str(with_bad))).close()
    plain_loader(ShardIndex.open(str(with_bad), decode=True), lenient=True).close()
    assert "--decode" not in caplog.text


def test_bad_pictures_leave_the_others_alone(with_bad: Path, tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    """Found on the way, known before, in whichever batch: every view is the same."""
    seen = {}
    for batch in (1, 4, 20):
        with make_loader(str(with_bad), RECIPE, global_batch=batch, renderer="torch", threads=0) as loader:
            seen[batch] = {int(each.drawn_for[b]): clone(each[b]) for each in loader for b in range(len(each))}
    for i, one in seen[1].items():
        for other in (4, 20):
            assert_same_pixels(one, seen[other][i])


@pytest.mark.parametrize("threads", [0, 2])
def test_too_many_bad_pictures_stop_by_name(with_bad: Path, threads: int) -> None:
    with make_loader(str(with_bad), RECIPE, global_batch=20, renderer="torch", threads=threads, max_bad=3) as loader:
        with pytest.raises(
            TooManyBadError, match=r"4 samples would not decode, max_bad=3: 3 \(.*bad\.tar:s03\), 4 \(.*wherefrom index"
        ) as caught:
            next(iter(loader))
        assert "\n" not in str(caught.value)


def test_nothing_valid_at_all_is_said(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> None:
    bad = undecodable(jpeg_bytes(np.zeros((40, 40, 3), np.uint8)))
    shard = make_shard(tmp_path / "none.tar", [(f"s{i}", {"jpg": bad}) for i in range(3)])
    loader = make_loader(str(shard), RECIPE, global_batch=3, renderer="torch", threads=0)
    with loader, pytest.raises(ValueError, match="none of the 3 samples is valid"):
        next(iter(loader))


def test_batch_replays_what_a_run_saw_and_cuts_a_picture_as_another(build: Callable[..., Loader]) -> None:
    loader = build(threads=2)
    loader.seek(loader.updates_per_epoch + 2)
    seen = clone(next(iter(loader)))
    assert_same_pixels(seen, loader.batch(seen.sample, epoch=1))
    crossed = loader.batch(seen.sample, drawn_for=seen.sample.flip(0), epoch=1)
    assert crossed.sample.tolist() == seen.sample.tolist() and crossed.drawn_for.tolist() == seen.sample.tolist()[::-1]
    assert torch.equal(crossed.family("local").geometry.flipped, seen.family("local").geometry.flipped.flip(0))
    assert not torch.equal(crossed.family("local").pixels, seen.family("local").pixels)
    assert len(loader.batch([])) == 0
    for wrong in ([56], [-1], [[0]], [1.5], [2.0], [True], ["3"], 0, np.array([2**63], np.uint64)):
        with pytest.raises(IndexError, match="ids are a row of whole numbers from 0 to 55"):
            loader.batch(wrong)
    with pytest.raises(ValueError, match=r"epoch=1\.0: needs a whole number"):
        loader.batch([0], epoch=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drawn_for has 1 ids, sample has 2"):
        loader.batch([0, 1], drawn_for=[0])


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_a_batch_keeps_what_it_was_asked_for_whatever_happens_to_the_asking(build: Callable[..., Loader], kind: Callable[..., Any]) -> None:
    sample, drawn_for = kind([3, 1, 4]), kind([2, 7, 1])
    loader = build()
    own, crossed = loader.batch(sample), loader.batch(sample, drawn_for)
    sample[:], drawn_for[:] = 0, 0
    own.sample[:] = 9
    assert own.drawn_for.tolist() == crossed.sample.tolist() == [3, 1, 4] and crossed.drawn_for.tolist() == [2, 7, 1]
    for views, other in zip(own.views, crossed.views, strict=True):
        assert views.geometry.sample.tolist() == views.geometry.drawn_for.tolist() == other.geometry.sample.tolist() == [3, 1, 4]
        assert other.geometry.drawn_for.tolist() == [2, 7, 1]


def test_a_drawn_record_is_its_own() -> None:
    ids, size, stored = np.array([3, 1]), np.array([[60, 80], [90, 70]], np.int32), np.array([6, 1], np.uint8)
    drawn = draw_records(RECIPE, seed=0, epoch=0, drawn_for=ids, source_size=size, stored_orientation=stored)
    ids[:], size[:], stored[:] = 0, 0, 0
    for geometry in (item.geometry for item in drawn):
        assert geometry.sample.tolist() == geometry.drawn_for.tolist() == [3, 1]
        assert geometry.source_size.tolist() == [[60, 80], [90, 70]] and geometry.stored_orientation.tolist() == [6, 1]


def test_sequential_ranks_together_see_everything_once(build: Callable[..., Loader], cpu_renderer: str) -> None:
    parts = [list(build(order="sequential", rank=rank, ranks=4, renderer=cpu_renderer, global_batch=24)) for rank in range(4)]
    assert [[len(batch) for batch in part] for part in parts] == [[6, 6, 6], [6, 6, 2], [6, 6, 0], [6, 6, 0]]
    assert sorted(i for part in parts for batch in part for i in batch.sample.tolist()) == list(range(56))
    assert parts[3][2].family("pair").pixels.shape == (0, 2, 3, 24, 24)


def test_stats_add_up(build: Callable[..., Loader]) -> None:
    loader = build(threads=2, accumulation=2)
    batches = list(loader)
    stats = loader.stats()
    ids = torch.cat([batch.sample for batch in batches]).numpy()
    assert (stats.pictures, stats.batches, stats.replaced) == (len(ids), len(batches), 0)
    assert stats.read_bytes == loader.index.length[ids].sum()
    assert stats.pixel_bytes == sum(views.pixels.nbytes for batch in batches for views in batch.views)
    assert stats.invalid_views == sum(int((~views.valid).sum()) for batch in batches for views in batch.views)
    assert stats.drawn == {"pair": 2 * len(ids), "local": 3 * len(ids)} and stats.accepted.keys() == stats.drawn.keys()
    assert min(stats.read_s, stats.draw_s, stats.decode_s, stats.render_s, stats.wait_s) > 0 and stats.copy_s == 0
    assert stats.make_s >= stats.read_s + stats.draw_s
    stats.drawn["pair"] = 0  # a copy
    assert loader.stats().drawn["pair"] == 2 * len(ids)


def test_no_more_is_made_ahead_than_stated(build: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    for prefetch in (1, 3):
        loader = build(threads=1, prefetch=prefetch, global_batch=2)
        stream = loader.forever()
        for taken in (1, 2, 3):
            next(stream)
            until = time.monotonic() + 20
            while loader.stats().batches < taken + prefetch and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.1)
            assert loader.stats().batches == taken + prefetch
        values = 2 * 3 * (2 * 24 * 24 + 3 * 16 * 20)
        assert loader.prefetch_bytes == prefetch * 4 * values
    with pytest.raises(ValueError, match="prefetch=0: needs at least 1 batch"):
        build(prefetch=0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def build_and_drop(make: Callable[[], Loader], count: int) -> None:
    """Build loaders and let go of them: some unused, some in the middle of an epoch, some closed, once or twice."""
    for number in range(count):
        loader = make()
        if number % 4:
            next(iter(loader))
        if number % 4 == 3:
            loader.close()
            loader.close()
        del loader
    gc.collect()


def assert_dropped_loaders_leave_nothing(make: Callable[[], Loader], count: int, allowed_bytes: float = 10e6) -> None:
    """Raise if threads, descriptors or more than some memory stay behind."""
    build_and_drop(make, 8)
    threads, descriptors, resident = threading.active_count(), len(os.listdir("/proc/self/fd")), resident_bytes()
    build_and_drop(make, count)
    until = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)  # a thread that was told to end may need a moment
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert resident_bytes() - resident < allowed_bytes


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts descriptors and memory in /proc")


@needs_proc
def test_dropped_loaders_leave_no_thread_and_no_growth(tiny_shards: Path) -> None:
    index = ShardIndex.open(str(tiny_shards))
    assert_dropped_loaders_leave_nothing(lambda: make_loader(index, RECIPE, global_batch=BATCH, renderer="torch", threads=2), 20)


@pytest.mark.slow
@needs_proc
# a DALI pipeline that stays takes 10 MB
def test_two_hundred_dropped_loaders_leave_no_thread_and_no_growth(tiny_shards: Path, cpu_renderer: str) -> None:
    allowed_bytes = 100e6 if cpu_renderer == "dali" else 10e6
    index = ShardIndex.open(str(tiny_shards))
    assert_dropped_loaders_leave_nothing(
        lambda: make_loader(index, RECIPE, global_batch=BATCH, renderer=cpu_renderer, threads=2), 200, allowed_bytes
    )


LARGE = ViewRecipe(families=(ViewFamily(name="large", views=5, size_px=(96, 96)),))  # 6.6 MB a batch of 12


def growth_bytes(loader: Loader, epochs: int) -> int:
    """How much resident memory grows from the third epoch on."""
    for epoch in range(epochs):
        for _ in loader:
            pass
        if epoch == 2:
            gc.collect()
            resident = resident_bytes()
    gc.collect()
    return resident_bytes() - resident


@needs_proc
def test_resident_memory_is_flat_over_epochs(build: Callable[..., Loader]) -> None:
    assert growth_bytes(build(LARGE, threads=2), 8) < 10e6


@needs_proc
def test_kept_batches_do_grow(build: Callable[..., Loader]) -> None:
    """The negative control of flat memory: five epochs of batches that are kept, in a process that holds no memory in reserve."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed
    before, kept = resident_bytes(), list(itertools.islice(build(LARGE, threads=2).forever(), 20))
    assert resident_bytes() - before > 100e6 and len(kept) == 20


@pytest.mark.slow
@needs_proc
def test_resident_memory_is_flat_over_ten_epochs_of_photographs(photographs: Path) -> None:
    recipe = ViewRecipe(
        families=(ViewFamily(name="global", views=2, size_px=(224, 224)), ViewFamily(name="local", views=8, size_px=(96, 96)))
    )
    with make_loader(str(photographs / "imagenet-sample"), recipe, global_batch=32, renderer="torch", threads=2) as loader:
        assert growth_bytes(loader, 10) < loader.prefetch_bytes / loader.prefetch / 2  # half a batch


def test_a_closed_loader_says_so(build: Callable[..., Loader]) -> None:
    for threads in (0, 2):
        loader = build(threads=threads)
        stream = loader.forever()
        next(stream)
        loader.close()
        for again in (stream, loader.forever(), iter(loader)):
            with pytest.raises(ValueError, match="the loader is closed; make another"):
                next(again)
        with pytest.raises(ValueError, match="is closed"):
            loader.batch([0])


def exit_code(child: Callable[[], None], limit_s: float = 30) -> int | None:
    """How a fork of this process that runs `child` ends: 0 well, None not within the limit."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    until = time.monotonic() + limit_s
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


@pytest.mark.core
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("used", [False, True])
def test_a_forked_process_makes_batches_in_threads_of_its_own(build: Callable[..., Loader], used: bool) -> None:
    """As a DataLoader forks its workers."""
    plain = build(threads=0)
    expected = [clone(batch) for _ in range(2) for batch in plain]
    loader = build(threads=2)
    if used:
        for batch, same in zip(loader, expected, strict=False):
            assert_same_pixels(batch, same)

    def child() -> None:
        passes = [batch for _ in range(1 if used else 2) for batch in loader]
        for batch, same in zip(passes, expected[-len(passes) :], strict=True):
            assert_same_pixels(batch, same)
        loader.close()
        with pytest.raises(ValueError, match="the loader is closed"):
            next(iter(loader))

    assert exit_code(child) == 0
    if not used:
        assert_same_pixels(next(iter(loader)), expected[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_pass_does_not_go_on_in_a_forked_process(build: Callable[..., Loader]) -> None:
    stream = build(threads=1).forever()
    next(stream)

    def child() -> None:
        with pytest.raises(ValueError, match="this pass over the loader began in another process; begin one in this process"):
            next(stream)

    assert exit_code(child) == 0
    assert len(next(stream)) == BATCH


def test_pinned_memory_is_kept_until_the_copy_on_its_own_gpu_is_done(build: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of CUDA: the event must stand on the stream of the loader's GPU, whichever is the current one."""
    recorded: list[Any] = []

    class Event:
        def record(self, stream: Any = "that of the current GPU") -> None:
            recorded.append(stream)

        def query(self) -> bool:
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"that of {device}")
    monkeypatch.setattr(Batch, "to", lambda batch, device, non_blocking: batch)
    loader = build(threads=0)
    loader.device = torch.device("cuda:1")
    batch = loader.batch([0, 1])
    assert recorded == ["that of cuda:1"] and [kept for _, kept in loader._copying] == [batch]


def test_a_consumer_on_a_stream_of_its_own_waits_for_views_rendered_on_its_gpu(
    build: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub of CUDA: streams note who waits for them, and pixels on which streams they are read."""
    done: list[tuple[str, str]] = []

    class Stream(str):
        def wait_stream(self, other: str) -> None:
            done.append((self, f"waits for {other}"))

    class Event:
        def record(self, stream: str) -> None:
            done.append((stream, "event"))

        def query(self) -> bool:
            return False

    class OnGPU(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

        def record_stream(self, stream: Any) -> None:
            done.append((stream, "reads"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream("default"))
    monkeypatch.setattr(Batch, "to", lambda batch, device, non_blocking: batch)
    loader = build(threads=0)
    rendered = loader.batch([0, 1])
    on_gpu = replace(rendered, views=tuple(replace(views, pixels=views.pixels.as_subclass(OnGPU)) for views in rendered.views))
    loader.device = torch.device("cuda:1")
    for stream, batch, expected in (
        ("side", on_gpu, [("side", "waits for default"), *[("side", "reads")] * len(rendered.views), ("side", "event")]),
        ("default", on_gpu, [("default", "event")]),
        ("side", rendered, [("side", "event")]),  # rendered on the CPU: the copy is the stream's own
    ):
        done.clear()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: Stream(stream))
        loader._handed_over(batch)
        assert done == expected


def test_what_is_marked_while_a_batch_is_drawn_anew_is_told_as_it_is_shown(build: Callable[..., Loader]) -> None:
    loader = build(threads=0)
    (drawn,) = loader._draw_batches(0, [(0, 0, 0)])
    first, second = (int(i) for i in drawn.ids[:2])
    loader.index.mark_invalid(first, "before the batch is made")
    draw = loader._drawn

    def marked_meanwhile(*given: Any) -> Any:
        loader.index.mark_invalid(second, "by another thread, while it is drawn anew")
        return draw(*given)

    loader._drawn = marked_meanwhile  # type: ignore[method-assign]
    batch = loader._make(drawn)
    assert second not in batch.sample.tolist() and not loader._bad  # rendered by another's record, it would not match its header
    for views in batch.views:
        assert torch.equal(views.geometry.sample, batch.sample)
    assert_same_pixels(batch, build(threads=0, index=loader.index).batch(batch.sample, drawn.drawn_for))


@pytest.mark.core
def test_photographs_come_as_their_index_says(photographs: Path, build: Callable[..., Loader]) -> None:
    recipe = ViewRecipe(
        families=(ViewFamily(name="global", views=2, size_px=(64, 64), mirror="view"), replace(LOCAL, min_side_px=16)), pixels="uint8"
    )
    loader = build(recipe, index=ShardIndex.open(str(photographs / "imagenet-sample")), global_batch=16, threads=2)
    batch = clone(next(iter(loader)))
    assert batch.label.min() >= 0 and loader.stats().replaced == 0
    assert all(views.valid.all() and views.pixels.float().std() > 20 for views in batch.views)
    assert_same_pixels(batch, build(recipe, index=loader.index, threads=0).batch(batch.sample))
