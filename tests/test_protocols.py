"""What all protocols stand on: features of both sides, reports that a stopped evaluation goes on with, ranks."""

import base64
import io
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_runs import METHODS
from PIL import Image

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools import evaluation_page
from wherefrom.tools.evaluation_page import write_page
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation import pair_controls
from wherefrom.train.evaluation.features import ENCODER, RANDOM, RAW, Evaluation, Part, last_layers
from wherefrom.train.evaluation.labels import evaluate_labels
from wherefrom.train.evaluation.network import Network
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.protocols import (
    Measured,
    NotMeasuredError,
    PairExample,
    Score,
    measure,
    protocols_named,
    read_report,
)
from wherefrom.train.evaluation.report import evaluate_run
from wherefrom.train.objective import Progress, Step
from wherefrom.train.ranks import Ranks
from wherefrom.train.settings import EvaluationSettings

pytestmark = pytest.mark.core


def network_of(seed: int = 3, px: int = 24) -> Network:
    torch.manual_seed(seed)
    encoder = Encoder(METHODS["dino"].model).requires_grad_(False).eval()
    return Network(encoder=encoder, name="ours", picture_px=px, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def sources(shards: Path) -> tuple[ShardPictures, ShardPictures]:
    train, held_out = (ShardPictures(ShardIndex.open(str(shards / f"{n}.tar")), renderer="torch", threads=1) for n in ("train", "val"))
    return train, held_out


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """A protocol that counts how often it is asked."""

    version: int = 1
    needs: tuple[Any, ...] = ()
    parts: tuple[Part, ...] = ()
    value: float = 0.5
    fails: bool = False
    error: str = ""
    of_rank: int = 0  # that meets the error
    partly: bool = False

    def measure(self, evaluation: Evaluation) -> Iterator[Score | NotMeasuredError]:
        ASKED.append(self.value)
        if self.fails:
            raise NotMeasuredError("there is nothing to count")
        if self.error and evaluation.ranks.rank == self.of_rank:
            raise ERRORS[self.error](f"rank {self.of_rank}\nstumbled")
        if self.error:
            evaluation.joined([torch.zeros(1)])
        if self.partly:
            yield NotMeasuredError("large ones: there are none")
        yield Score(row="times", features=ENCODER, value=self.value if self.value >= 0 else math.nan)


ASKED: list[float] = []
ERRORS: dict[str, type[Exception]] = {"value": ValueError, "memory": MemoryError, "key": KeyError}
METHODS_OF_A_RUN = ("spatial", "rotation", "jigsaw")


def test_parts_of_whole_pictures_are_what_the_run_judges_by(tiny_shards: Path) -> None:
    """The accuracies of the run's own report follow from these features, too."""
    network = network_of()
    train, held_out = sources(tiny_shards)
    with train, held_out:
        evaluation = Evaluation(network, train, held_out)
        known = evaluate_labels(network.encoder, train, held_out, view_px=24, picture_px=24, probe=False)
        (knn,) = measure(evaluation, protocols_named(["knn@1"]))
        assert known is not None
        told = {(score.row, score.features): score.value for score in knn.scores}
        for token in ("class", "mean"):
            protocol = f"knn20-cosine-t0.07-center0.875-{token}-token@1"
            for column in (ENCODER, RANDOM):
                assert told[f"{token} token, k 20", column] == known.accuracy(protocol, column)
        labeled = evaluation.labeled("train", Part(token="class", layers=1, and_mean=True))
        assert {column: values.shape for column, values in labeled.features.items()} == {
            ENCODER: (40, 64),
            RANDOM: (40, 64),
            RAW: (40, 3 * 32 * 32),
        }
        index = train.index
        assert sorted(labeled.ids.tolist()) == list(range(40))
        assert labeled.labels.tolist() == index.label[labeled.ids].tolist()


def test_the_last_layer_has_the_tokens_that_encoding_gives() -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(METHODS["dino"].model, depth=3, tokens_from_block=-2)).eval()
    views = torch.randn(2, 1, 3, 24, 24)
    with torch.no_grad():
        features, plain = encoder.encode(views), encoder.last_layers(views, 3)
        for number in (1, 2, 3):
            layers = last_layers(encoder, views, number)
            assert len(layers) == number
            assert torch.allclose(layers[-1].tokens, features.tokens, atol=1e-6)
            assert torch.allclose(layers[-1].summary, features.summary, atol=1e-6)
            assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(layers[:-1], plain[3 - number : -1], strict=True))
    assert not torch.allclose(plain[-1].tokens, features.tokens, atol=1e-2)


def test_what_the_summary_is_makes_another_network() -> None:
    settings = METHODS["dino"].model
    networks = []
    for summary in ("auto", "class", "mean"):
        torch.manual_seed(0)
        networks.append(replace(network_of(), encoder=Encoder(replace(settings, summary=summary))))
    auto, of_class, mean = (network.identity for network in networks)
    assert auto == of_class != mean


def test_a_report_is_gone_on_with_unless_network_pictures_or_choices_changed(tiny_shards: Path, tmp_path: Path) -> None:
    network, file = network_of(), tmp_path / "evaluation.json"
    train, held_out = sources(tiny_shards)
    with train, held_out:

        def asked(of: Network = network, about: str = "these", **choices: Any) -> int:
            before = len(ASKED)
            protocols = {"one": Counting(**choices), "two": Counting(value=0.25)}
            found = measure(Evaluation(of, train, held_out), protocols, file=file, about={"held_out": about})
            assert [each.protocol for each in found] == ["one@1" if "version" not in choices else "one@2", "two@1"]
            return len(ASKED) - before

        assert asked() == 2
        assert asked() == 0
        file.write_text(json.dumps(json.loads(file.read_text()) | {"protocols": json.loads(file.read_text())["protocols"][:1]}))
        assert asked() == 1  # as after a kill between the two
        assert asked(replace(network, name="elsewhere")) == 0
        assert asked(value=0.75) == 1
        assert asked(version=2) == 1
        assert asked(about="others") == 2
        assert asked(network_of(seed=4), about="others") == 2
        for bad in ("{ torn", file.read_text().replace('"value": 0.5', '"value": "0.5"'), "[" * 200000):
            file.write_text(bad)
            assert asked() == 2


def test_results_of_several_calls_gather_and_none_is_lost(tiny_shards: Path, tmp_path: Path) -> None:
    file, put_aside = tmp_path / "evaluation.json", list[Path]()
    train, held_out = sources(tiny_shards)
    with train, held_out:

        def asked(*names: str, here: bool = True, again: bool = False, of: Network | None = None, **about: Any) -> int:
            before = len(ASKED)
            counting = {"plain": Counting(), "masks": Counting(needs=("masks",)), "others": Counting(needs=("variants",))}
            masked: dict[str, Any] = {"masked": (train, held_out), "others": dict.fromkeys(about.get("others", ()), lambda: train)}
            evaluation = Evaluation(of or network_of(), train, held_out, **masked if here else {})
            measure(
                evaluation,
                {name: counting[name] for name in names},
                file=file,
                about={"train": "these"} | about,
                again=again,
                aside=put_aside.append,
            )
            return len(ASKED) - before

        def held() -> list[str]:
            return [measured.protocol for measured in read_report(file).measured if measured.scores]

        assert asked("plain") == 1
        assert asked("masks", masks=["a", "b"]) == 1
        assert asked("others", others={"imagenet-r": "/r"}) == 1
        assert asked("plain", "masks", "others", masks=["a", "b"], others={"imagenet-r": "/r", "imagenet-c": "/c"}) == 0
        assert asked("plain", "masks", here=False) == 0  # no masks here: those of the call before
        assert asked("masks", masks=["a", "b"], again=True) == 1
        assert (held(), put_aside) == (["plain@1", "masks@1", "others@1"], [])
        assert asked("masks", masks=["a", "c"]) == 1
        assert put_aside == [tmp_path / "evaluation-1.json"]
        assert [len(read_report(path).measured) for path in (file, *put_aside)] == [3, 3]  # the others are in both
        assert asked("plain", of=network_of(seed=4)) == 1
        assert (held(), put_aside[1:]) == (["plain@1"], [tmp_path / "evaluation-2.json"])
        assert asked("plain", train="others", of=network_of(seed=4)) == 1
        assert len(put_aside) == 3


def test_reports_that_said_all_conditions_once_are_still_read(tiny_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    train, held_out = sources(tiny_shards)
    protocols = {"plain": Counting(), "masks": Counting(needs=("masks",))}
    with train, held_out:
        evaluation = Evaluation(network_of(), train, held_out, masked=(train, held_out))  # type: ignore[arg-type]
        about: dict[str, Any] = {"train": "these", "others": {}, "limit": None, "masks": ["a", "b"]}
        measure(evaluation, protocols, file=file, about=about)
        old = json.loads(file.read_text()) | about
        for each in old["protocols"]:
            del each["of"], each["notes"], each["failed"]
        file.write_text(json.dumps(old))
        before = len(ASKED)
        measure(evaluation, protocols, file=file, about=about)
        assert len(ASKED) == before
        measure(evaluation, protocols, file=file, about=about | {"masks": ["a", "c"]})
        assert len(ASKED) == before + 1


@pytest.mark.parametrize("error", ["value", "memory"])
def test_a_protocol_that_fails_stops_no_other(error: str, tiny_shards: Path, tmp_path: Path) -> None:
    train, held_out = sources(tiny_shards)
    protocols = {"one": Counting(error=error), "two": Counting(partly=True), "three": Counting(fails=True)}
    with train, held_out:
        found = measure(Evaluation(network_of(), train, held_out), protocols, file=tmp_path / "evaluation.json")
        with pytest.raises(KeyError):
            measure(Evaluation(network_of(), train, held_out), {"one": Counting(error="key")})
    assert [each.failed for each in found] == [True, False, False]
    assert found[0].table() == (("one@1: not measured, rank 0 stumbled",),)
    assert (found[1].notes, len(found[1].scores), found[1].not_measured) == (("large ones: there are none",), 1, "")
    assert read_report(tmp_path / "evaluation.json").measured == found


def test_what_cannot_be_measured_says_why_and_stops_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    train, held_out = sources(tiny_shards)
    protocols = {"one": Counting(fails=True), "two": Counting(value=-1.0), "three": Counting()}
    with train, held_out:
        found = measure(Evaluation(network_of(), train, held_out), protocols, file=tmp_path / "evaluation.json")
        again = measure(Evaluation(network_of(), train, held_out), protocols, file=tmp_path / "evaluation.json")
    assert found[0].table() == (("one@1: not measured, there is nothing to count",),)
    assert found[1].table() == (("two@1", ENCODER), ("times", "-"))
    assert found[2].table() == (("three@1", ENCODER), ("times", "0.5000"))
    assert math.isnan(again[1].scores[0].value)
    assert (found[0].not_measured, found[2].scores) == (again[0].not_measured, again[2].scores)


def test_protocols_are_named_with_or_without_their_version() -> None:
    assert protocols_named(["knn"]) == protocols_named(["knn@1"])
    assert "knn" in protocols_named([])
    with pytest.raises(ValueError, match=r"protocol 'knn@7': this is knn@1; take that"):
        protocols_named(["knn@7"])
    with pytest.raises(ValueError, match="no protocol 'kn'; did you mean 'knn'"):
        protocols_named(["kn"])


def test_without_labels_protocols_of_labels_say_so(tmp_path: Path, make_shard: Any, jpeg_bytes: Any, tiny_shards: Path) -> None:
    shard = make_shard(tmp_path / "x.tar", [(f"{i}", {"jpg": jpeg_bytes(np.full((40, 40, 3), 9 * i, np.uint8))}) for i in range(4)])
    with ShardPictures(ShardIndex.open(str(shard)), renderer="torch", threads=1) as pictures:
        (found,) = measure(Evaluation(network_of(), pictures, pictures), protocols_named(["knn"]))
    assert found.not_measured == "the pictures have no labels (--labels)"


def test_the_page_shows_scores_neighbors_and_token_maps(tiny_shards: Path, tmp_path: Path) -> None:
    """Of itself a picture is the nearest neighbor, by a cosine of 1."""
    train, held_out = sources(tiny_shards)
    with train, held_out:
        evaluation = Evaluation(network_of(), train, train)
        found = measure(evaluation, protocols_named(["knn"]) | {"fails": Counting(fails=True)})
        write_page(tmp_path / "page.html", evaluation, found, about=["<of ours>"])
    text = (tmp_path / "page.html").read_text()
    assert "&lt;of ours&gt;" in text
    assert "<td>class token, k 10</td>" in text
    assert "fails@1: not measured, there is nothing to count" in text
    assert text.count("<figcaption>held out</figcaption>") == 8
    assert text.count("<figcaption>1.00</figcaption>") >= 8
    pictures = [base64.b64decode(word.partition('"')[0]) for word in text.split("base64,")[1:]]
    assert len(pictures) == 8 * 7 + 8 * 2
    sizes = {Image.open(io.BytesIO(picture)).size for picture in pictures}
    assert sizes == {(112, 112)}
    assert "http" not in text  # nothing is fetched


def test_the_page_draws_pairs_where_they_lie(tiny_shards: Path, tmp_path: Path) -> None:
    """Of a picture of its own size, the box that is told is orange where it was told, and overlaps as boxes do."""
    train, held_out = sources(tiny_shards)
    with train, held_out:
        evaluation = Evaluation(network_of(), train, held_out)
        height, width = held_out.index.source_size[3].tolist()
        boxes = {"reference": (2.0, 2.0, 12.0, 12.0), "target": (4.0, 4.0, 14.0, 14.0), "told": (9.0, 4.0, 19.0, 14.0)}
        example = PairExample(law="paired", rank="worst", sample=3, **boxes)
        found = Measured(protocol="pairs@1", choices={}, scores=(), seconds=0.0, examples=(example,))
        write_page(tmp_path / "page.html", evaluation, [found], about=[])
        pixels = evaluation_page._with_boxes(evaluation, example)
    text = (tmp_path / "page.html").read_text()
    assert "Law paired, worst:" in text and text.count('class="key') == 3
    assert "<figcaption>0.50 sides off, overlap 0.33</figcaption>" in text
    margin, scale = 22, 176 / max(height, width)
    assert pixels.shape[:2] == (round(scale * height) + 2 * margin, round(scale * width) + 2 * margin)
    orange = (pixels == [230, 159, 0]).all(-1).nonzero()
    place = {"y": (orange[0].min(), orange[0].max()), "x": (orange[1].min(), orange[1].max())}
    assert place["x"] == pytest.approx((margin + 9 * scale, margin + 19 * scale), abs=4)
    assert place["y"] == pytest.approx((margin + 4 * scale, margin + 14 * scale), abs=4)


def be_a_rank(shards: Path, folder: Path, rank: int, count: int) -> None:
    """Measure on one of several ranks, and write down what it found."""
    torch.set_num_threads(1)
    train, held_out = sources(shards)
    with train, held_out:
        evaluation = Evaluation(network_of(), train, held_out, ranks=Ranks(rank, count))
        (knn,) = measure(evaluation, protocols_named(["knn"]), file=folder / f"of-{count}.json")
        failing = {"last": Counting(error="value", of_rank=count - 1), "first": Counting(error="value"), "none": Counting()}
        failures = [measured.not_measured for measured in measure(evaluation, failing)]
        assert failures == [f"rank {count - 1} stumbled", "rank 0 stumbled", ""]
        sums = {column: float(values.double().sum()) for column, values in evaluation.labeled("train", Part(token="mean")).features.items()}
        step = Step(
            network_of().encoder.requires_grad_(True), [METHODS[name].settings.objective(name) for name in METHODS_OF_A_RUN], seed=0
        )
        settings = EvaluationSettings(pictures=12, head_pictures=16, head_steps=2, knn_pictures=40, short_pictures=8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pair_controls, "ORACLE_PAIRS", 2000)
            options = {"view_px": 24, "picture_px": 24, "at": Progress(update=1, updates=2, updates_per_epoch=1), "ranks": evaluation.ranks}
            reports = [evaluate_run(step, train, held_out, settings, full=full, **options).report for full in (False, True)]
    told: dict[str, Any] = {"reports": reports} | {
        "scores": [[score.row, score.features, score.value] for score in knn.scores],
        "sums": sums,
    }
    (folder / f"rank-{rank}-of-{count}.json").write_text(json.dumps(told))


def test_two_ranks_find_what_one_does_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tiny_shards), str(tmp_path)]
    processes = [subprocess.Popen(command, env=shared | {"RANK": rank}, stderr=subprocess.PIPE) for rank in "01"]
    be_a_rank(tiny_shards, tmp_path, 0, 1)
    for process in processes:
        _, complaint = process.communicate(timeout=200)
        assert process.returncode == 0, complaint.decode()[-2000:]
    alone, *both = (json.loads((tmp_path / f"rank-{rank}-of-{count}.json").read_text()) for rank, count in ((0, 1), (0, 2), (1, 2)))
    assert both[0] == both[1] == alone
    assert set(alone["reports"][1]) == {"update", "full", "labels", *METHODS_OF_A_RUN}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    be_a_rank(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"]), 2)
    torch.distributed.destroy_process_group()
