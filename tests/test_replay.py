"""Batches drawn again from a run's folder, against checksums of the pixels that the run took from its loader while it trained."""

import dataclasses
import hashlib
import json
import re
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from wherefrom.pipeline import Batch, ColorLaw, Disjoint, Loader, Record, ShardIndex
from wherefrom.tools.replay import replay_command
from wherefrom.tools.views_picture import save_batch_picture
from wherefrom.train import checkpoint
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.loop import run
from wherefrom.train.objectives import DenseSpatialSettings, SpatialSettings
from wherefrom.train.replay import open_replay, replayed_batch
from wherefrom.train.reporting import LogRecord, Reporter
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.settings import RuntimeSettings, TrainSettings

pytestmark = pytest.mark.core

Sums = dict[int, list[tuple[int, str]]]  # update -> the sample drawn for and the checksum of all its pixels, in the batch's order


def tiny(data: Path, *, updates: int = 12, renderer: str = "torch", accumulation: int = 1, **changes: Any) -> TrainSettings:
    """Return a run of three epochs over 40 pictures, with two families of views, mirrors and colors."""
    runtime = RuntimeSettings(
        device="cpu", renderer=renderer, threads=1, accumulation=accumulation, log_every=1, checkpoint_every=4, log_with="none"
    )
    color = ColorLaw(blur_prob=0.5)
    settings = TrainSettings(
        recipe="mine",
        data=str(data),
        global_batch=8,
        updates=updates,
        seed=3,
        model=ModelSettings(view_size_px=24, patch_size_px=12, width=32, depth=1, heads=2),
        objectives={
            "spatial": SpatialSettings(
                law=Disjoint(area_frac=(0.06, 0.16)), views=3, size_px=24, min_side_px=4, mirror="view", color=color
            ),
            "dense": DenseSpatialSettings(size_px=48, regions=3, min_side_px=4, pairs="all"),  # or micro-batches belong to the run
        },
        runtime=runtime,
    )
    return dataclasses.replace(settings, **changes)


def sums_of(batch: Batch) -> list[tuple[int, str]]:
    """Return for each sample of a batch which it is drawn for, and a checksum of its pixels in all families."""
    return [
        (int(batch.drawn_for[b]), hashlib.sha256(b"".join(views.pixels[b].numpy().tobytes() for views in batch.views)).hexdigest())
        for b in range(len(batch))
    ]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Sums:
    """What runs of this process take from their loaders from now on, by update; the last making of an update counts."""
    sums: Sums = defaultdict(list)
    deliver = Loader.forever

    def watched(loader: Loader) -> Iterator[Batch]:
        update = loader.updates
        for number, batch in enumerate(deliver(loader)):
            if number % loader.order.accumulation == 0:
                update += 1
                sums[update] = []
            sums[update] += sums_of(batch)
            yield batch

    monkeypatch.setattr(Loader, "forever", watched)
    return sums


def assert_replayed(out: Path, seen: Sums, updates: int, **options: Any) -> None:
    assert sorted(seen) == list(range(1, updates + 1))
    for update in seen:
        assert sums_of(replayed_batch(out, update, threads=0, **options)) == seen[update], f"update {update}"


class _StopsAt(Reporter):
    """A reporter that asks the run to stop at an update, once."""

    def __init__(self, update: int) -> None:
        self.update = update

    def logged(self, record: LogRecord) -> None:
        if record.update == self.update:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("order", ["shuffled", "block"])
def test_every_update_is_replayed_to_the_very_pixels_in_every_epoch(
    order: str, accumulation: int, tiny_shards: Path, tmp_path: Path, seen: Sums
) -> None:
    run(tiny(tiny_shards / "train.tar", accumulation=accumulation, order=order), reporter=Reporter(), out=tmp_path / "run")
    assert_replayed(tmp_path / "run", seen, 12)
    batch = replayed_batch(tmp_path / "run", 7)  # the second of the second epoch
    assert [views.geometry.epoch for views in batch.views] == [1, 1]
    # another update, and the same one of another seed, are not taken for it
    assert sums_of(replayed_batch(tmp_path / "run", 6)) != seen[7]
    settings = RunFolder(tmp_path / "run").settings
    settings.write_text(settings.read_text().replace("seed: 3", "seed: 4"))
    with pytest.raises(ValueError, match="position has seed=3, this loader has 4"):
        replayed_batch(tmp_path / "run", 7)


def test_after_a_stop_and_under_another_renderer_each_update_is_replayed_by_the_one_that_made_it(
    tiny_shards: Path, tmp_path: Path, seen: Sums
) -> None:
    data, out = tiny_shards / "train.tar", tmp_path / "run"
    assert run(tiny(data), reporter=_StopsAt(6), out=out).update == 7
    first = {update: list(sums) for update, sums in seen.items()}
    run(tiny(data, renderer="native"), reporter=_StopsAt(9), out=out, resume=True)
    latest = RunFolder(out).checkpoints / checkpoint.LATEST
    latest.write_text("update-00000008\n")  # as if killed before the tenth update was saved: it is made again
    run(tiny(data, renderer="native", accumulation=2), reporter=Reporter(), out=out, resume=True)
    assert {update: seen[update] for update in range(1, 8)} == {update: first[update] for update in range(1, 8)}
    assert_replayed(out, seen, 12)
    assert [open_replay(out, update).loader.renderer.name for update in (7, 8)] == ["torch", "native"]
    start = RunFolder(out).metrics.read_text().splitlines()[0]
    RunFolder(out).metrics.write_text(start.replace('"renderer": "torch"', '"renderer": "native"') + "\n")
    assert sums_of(replayed_batch(out, 7)) != seen[7]  # control: pixels of two renderers differ


def with_damage(make_shard: Callable[..., Path], shards: Path, path: Path) -> Path:
    """Write a shard of the training pictures, of which three look right and will not decode, two of them neighbors."""
    index = ShardIndex.open(shards / "train.tar")
    whole = (shards / "train.tar").read_bytes()
    samples = []
    for i, (offset, length) in enumerate(zip(index.offset.tolist(), index.length.tolist(), strict=True)):
        picture = bytearray(whole[offset : offset + length])
        if i in (3, 4, 39):
            scan = picture.index(b"\xff\xda") + 14
            picture[scan + 40 : scan + 80] = b"\xff\x00" * 20
            picture[scan + 80 : scan + 160] = bytes(80)
        samples.append((f"{i:03d}", {"jpg": bytes(picture)}))
    return make_shard(path, samples)


def test_pictures_that_would_not_decode_are_replaced_by_the_same_ones_before_and_after_an_audit(
    tiny_shards: Path, tmp_path: Path, make_shard: Callable[..., Path], seen: Sums
) -> None:
    data = with_damage(make_shard, tiny_shards, tmp_path / "some.tar")
    run(tiny(data, updates=5).with_objectives(dense=None), reporter=Reporter(), out=tmp_path / "run")
    assert_replayed(tmp_path / "run", seen, 5)
    assert ShardIndex.open(data).invalid_count == 0
    assert ShardIndex.open(data, decode=True).invalid_count == 3
    assert_replayed(tmp_path / "run", seen, 5)
    shown = {int(d): int(s) for u in seen for s, d in zip(*(_ids(tmp_path / "run", u)), strict=True)}
    assert {drawn_for: sample for drawn_for, sample in shown.items() if drawn_for != sample} == {3: 5, 4: 5, 39: 0}


def _ids(out: Path, update: int) -> tuple[list[int], list[int]]:
    batch = replayed_batch(out, update, threads=0)
    return batch.sample.tolist(), batch.drawn_for.tolist()


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of twelve updates."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(tiny(tiny_shards / "train.tar"), reporter=Reporter(), out=out)
    return out


def test_data_that_lies_elsewhere_is_named_and_other_data_refused_by_both_fingerprints(
    finished: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    expected = sums_of(replayed_batch(finished, 9))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(tiny_shards / "train.tar", moved)
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    settings = yaml.safe_load((out / "settings.yaml").read_text()) | {"data": "/nowhere/train.tar"}
    (out / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))  # the first objective is the host
    with pytest.raises(FileNotFoundError, match=r"/nowhere/train\.tar: no such file.* lies elsewhere now, name it by --data") as refused:
        replayed_batch(out, 9)
    assert "\n" not in str(refused.value)
    assert sums_of(replayed_batch(out, 9, data=str(moved / "train.tar"))) == expected

    ours, other = (ShardIndex.open(tiny_shards / f"{name}.tar").fingerprint for name in ("train", "val"))
    with pytest.raises(
        ValueError, match=rf"val\.tar has the fingerprint {other}, the data that .*run learned from has {ours}; "
    ) as refused:
        replayed_batch(out, 9, data=str(tiny_shards / "val.tar"))
    assert "\n" not in str(refused.value)


def test_some_samples_of_a_batch_are_the_same_pixels_and_others_are_looked_for(finished: Path) -> None:
    whole = replayed_batch(finished, 9)
    ids = whole.drawn_for.tolist()
    assert sums_of(replayed_batch(finished, 9, samples=[ids[5], ids[2]])) == [sums_of(whole)[5], sums_of(whole)[2]]
    with open_replay(finished, 9) as replay:
        everywhere = {update: replay.loader.order.micro_batch(*divmod(update - 1, 5), 0).tolist() for update in range(1, 13)}
    for sample in set(range(40)) - set(ids):
        showing = [update for update, held in everywhere.items() if sample in held]
        before, after = [u for u in showing if u < 9][-1:], [u for u in showing if u > 9][:1]
        words = " and ".join(rf"update {u} \(epoch {(u - 1) // 5}\)" for u in before + after)
        with pytest.raises(ValueError, match=rf"^sample {sample} is not in update 9 \(epoch 1\); it is in {words}$"):
            replayed_batch(finished, 9, samples=[sample])
    with pytest.raises(ValueError, match="sample 40 of 40; samples are numbered 0 to 39"):
        replayed_batch(finished, 9, samples=[40])


def test_a_sample_that_no_update_shows_is_told_so(tiny_shards: Path, tmp_path: Path) -> None:
    settings = tiny(tiny_shards / "train.tar", updates=1, global_batch=24).with_objectives(dense=None)
    run(settings, reporter=Reporter(), out=tmp_path / "run")
    missing = min(set(range(40)) - set(replayed_batch(tmp_path / "run", 1).drawn_for.tolist()))
    with pytest.raises(ValueError, match=f"sample {missing} is not in update 1 .*; no update of the run, which has 1, holds it"):
        replayed_batch(tmp_path / "run", 1, samples=[missing])


def test_what_may_make_a_difference_is_said(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    folder = RunFolder(out)
    with open_replay(out, 12) as replay:
        assert replay.notes == ()
    first, *lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("\n".join([first, *lines[:9]]) + "\n")
    with open_replay(out, 12) as replay:
        assert replay.notes == ("update 12 is not in the log, which ends at 9: this is what it will see",)
    folder.metrics.write_text(first.replace('"renderer": "torch"', '"renderer": "triton"').replace('"device": "cpu"', '"device": "H200"'))
    if not torch.cuda.is_available():
        with open_replay(out, 1) as replay:
            assert re.fullmatch("rendered by native, for triton, the run's, cannot run here .*: pixels differ by rounding", replay.notes[0])
            assert len(replay.batch()) == 8
    folder.metrics.unlink()  # of a run of before positions were logged: the checkpoint's serves
    with open_replay(out, 1) as replay:
        assert [note for note in replay.notes if "not in the log" not in note] == []
    shutil.rmtree(folder.checkpoints)
    with open_replay(out, 1) as replay:
        assert replay.notes[0].endswith("run holds no position: whether the data is still what it learned from is not known")


def test_a_lenient_decoder_of_a_run_is_told_apart(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    metrics = RunFolder(out).metrics
    text = metrics.read_text()
    metrics.write_text(text.replace('"decoding": "strict"', '"decoding": "lenient"').replace('"invalid": "', '"invalid": "0'))
    with open_replay(out, 1) as replay:
        assert replay.notes == ("the run's decoder on the GPU may have shown damaged pictures in part, which are replaced here",)
    metrics.write_text(text.replace('"invalid": "', '"invalid": "0'))
    with pytest.raises(ValueError, match=r"run: position has invalid='0"):
        open_replay(out, 1)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (0, r"update 0 of 12: updates are numbered 1 to 12, as in metrics\.jsonl"),
        (13, "update 13 of 12: updates"),
        (-1, "update -1 of 12"),
        (1.0, r"update=1\.0: needs a whole number"),
    ],
)
def test_an_update_that_there_is_not_is_refused_in_one_line(finished: Path, update: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        replayed_batch(finished, update)
    assert "\n" not in str(refused.value)


def test_a_folder_that_holds_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no settings\.yaml; name the folder of a run, such as runs/demo-0$"):
        replayed_batch(tmp_path, 1)


def test_records_of_a_replay_are_those_of_its_views_and_say_which_kept_their_law(finished: Path) -> None:
    with open_replay(finished, 9) as replay:
        batch = replay.batch()
        records = replay.records(batch)
    for views, record in zip(batch.views, records, strict=True):
        again = Record(geometry=views.geometry, photometric=views.photometric, valid=views.valid, accepted=record.accepted)
        assert record.to_json() == again.to_json()
    assert np.array([record.accepted.numpy().any() for record in records]).all()
    assert json.loads(records[0].to_json())["epoch"] == 1


def test_the_command_draws_the_views_of_an_update_and_writes_their_records(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replayed_batch(finished, 9)
    ids = whole.drawn_for.tolist()
    out, records = tmp_path / "some.png", tmp_path / "records.jsonl"
    assert replay_command(finished, update=9, samples=2, out=out, record=records) == 0
    assert capsys.readouterr().out == (
        f"{out}: update 9 of 12 (epoch 1, step 3), samples {ids[0]}, {ids[1]} of its 8, torch renderer\n{records}: 2 x 2 records\n"
    )
    lines = [Record.from_json(line) for line in records.read_text().splitlines()]
    assert [(int(line.geometry.sample), line.geometry.family) for line in lines] == [
        (sample, family) for sample in ids[:2] for family in ("spatial", "dense")
    ]
    assert torch.equal(lines[2].geometry.boxes, whole.family("spatial").geometry.boxes[1:2])

    # the same picture as of the loader's batch, and another one of another sample
    same, other = tmp_path / "same.png", tmp_path / "other.png"
    with open_replay(finished, 9) as replay:
        batch, objectives = replay.loader.batch(ids[:2], epoch=1), replay.settings.make_objectives()
        save_batch_picture(same, replay.loader, batch, objectives=objectives, title="run, update 9 of 12")
    assert out.read_bytes() == same.read_bytes()
    assert replay_command(finished, update=9, sample=ids[5], out=other) == 0
    assert capsys.readouterr().out == f"{other}: update 9 of 12 (epoch 1, step 3), sample {ids[5]} of its 8, torch renderer\n"
    assert other.read_bytes() != out.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update": None}, r"run: which update\? e\.g\. --update 1, the first"),
        ({"update": 13}, "update 13 of 12"),
        ({"samples": 0}, "samples=0: needs at least 1"),
        ({"sample": 40}, "sample 40 of 40"),
        ({"out": Path("nowhere/some.png")}, "there is no folder .*nowhere; make it, or take another --out"),
        ({"record": Path("nowhere/some.jsonl")}, "there is no folder .*nowhere; make it, or take another --record"),
        ({"data": "nowhere.tar"}, r"nowhere\.tar: no such file"),
        ({"run": Path("nowhere")}, r"nowhere: holds no settings\.yaml"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line_and_nothing_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as refused:
        replay_command(**({"run": finished, "update": 9} | arguments))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
