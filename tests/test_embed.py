"""Features as files: those that encoding gives, gone on with where a command was stopped, refused where they are of something else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_protocols import network_of

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.train.evaluation import embedding
from wherefrom.train.evaluation.embedding import embed
from wherefrom.train.evaluation.features import Part
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.ranks import Ranks

pytestmark = pytest.mark.core

PARTS = {"summary": Part(), "class": Part(token="class"), "mean": Part(token="mean")}


@pytest.fixture
def pictures(tmp_path: Path, make_shard: Any, jpeg_bytes: Any) -> ShardIndex:
    """10 pictures, the fourth of which is cut off."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(10):
        data = jpeg_bytes(rng.integers(0, 256, (40, 48 + i, 3)).astype(np.uint8))
        samples.append((f"picture{i}", {"jpg": data[:400] if i == 3 else data, "cls": str(i % 3).encode()}))
    return ShardIndex.open(str(make_shard(tmp_path / "ten.tar", samples)))


def written(index: ShardIndex, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    with ShardPictures(index, renderer="torch", threads=1) as source:
        embed(network_of(), source, folder, **{"parts": PARTS, "tokens": True, "key_of": index.key} | options)
    files = sorted(folder.glob("*.safetensors"))
    loaded = [load_file(file) for file in files]
    return {name: torch.cat([each[name] for each in loaded]) for name in loaded[0]} if loaded else {}


def test_files_hold_what_encoding_gives(pictures: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PIECE", 4)
    held = written(pictures, tmp_path / "out")
    names = [path.name for path in sorted((tmp_path / "out").glob("features-*"))]
    assert names == [f"features-00000{number}-of-000003.safetensors" for number in range(3)]
    network = network_of()
    with ShardPictures(pictures, renderer="torch", threads=1) as source:
        family = embedding.ViewFamily(name="whole", views=1, size_px=(24, 24), law=embedding.WHOLE)
        recipe = embedding.ViewRecipe(families=(family,), mean=network.mean, std=network.std)
        views = source.views(recipe, np.arange(10))
    with torch.no_grad():
        features = network.encoder.encode(views.family("whole"))
    assert torch.allclose(held["summary"], features.summary[:, 0], atol=1e-6)
    assert torch.allclose(held["tokens"], features.tokens[:, 0], atol=1e-6)
    assert torch.allclose(held["mean"], features.tokens[:, 0].flatten(1, 2).mean(1), atol=1e-6)
    assert features.prefix is not None
    assert torch.allclose(held["class"], features.prefix[:, 0, 0], atol=1e-6)
    assert not torch.allclose(held["class"], held["mean"], atol=1e-3)  # control
    assert held["sample"].tolist() == list(range(10))
    assert held["shown"].tolist() == views.sample.tolist() != list(range(10))  # the damaged one has another in its place
    with safe_open(tmp_path / "out" / names[1], "pt") as file:
        assert json.loads(file.metadata()["keys"]) == [f"picture{i}" for i in range(4, 8)]


def test_what_was_stopped_is_gone_on_with(pictures: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PIECE", 4)
    whole = written(pictures, tmp_path / "whole")
    plain = embedding._columns
    made: list[int] = []

    def stopped(network: Any, source: Any, ids: Any, *rest: Any, **options: Any) -> Any:
        made.append(int(ids[0]))
        if made == [0, 4]:
            raise KeyboardInterrupt
        return plain(network, source, ids, *rest, **options)

    monkeypatch.setattr(embedding, "_columns", stopped)
    with pytest.raises(KeyboardInterrupt):
        written(pictures, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("features-*"))) == 1
    held = written(pictures, tmp_path / "out")
    assert made == [0, 4, 4, 8]
    assert all(torch.equal(held[name], whole[name]) for name in whole)


def test_other_features_are_refused_by_name(pictures: ShardIndex, tmp_path: Path) -> None:
    written(pictures, tmp_path / "out")
    with pytest.raises(ValueError, match="holds features with picture_px 24, not 36; take another --out"):
        written(pictures, tmp_path / "out", picture_px=36)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ValueError, match="other: is not empty; take another --out"):
        written(pictures, tmp_path / "other")


def test_files_of_tokens_have_fewer_pictures(pictures: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PIECE_OF_TOKENS", 4)
    assert len(written(pictures, tmp_path / "tokens")["sample"]) == len(written(pictures, tmp_path / "parts", tokens=False)["sample"]) == 10
    assert [len(list((tmp_path / name).glob("*.safetensors"))) for name in ("tokens", "parts")] == [3, 1]


def test_a_size_that_the_network_does_not_take_leaves_no_folder(pictures: ShardIndex, tmp_path: Path) -> None:
    for px, message in ((37, "patches must divide a view"), (0, "picture_px=0: "), (-16, "picture_px=-16: ")):
        with pytest.raises(ValueError, match=message):
            written(pictures, tmp_path / "out", picture_px=px)
    assert not (tmp_path / "out").exists()


def test_ranks_share_the_files(pictures: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PIECE", 4)
    ranks = [Ranks(0, 1), Ranks(0, 1)]
    for rank in (0, 1):  # one after the other, as if the other were at its own
        ranks[rank].rank, ranks[rank].count = rank, 2
        monkeypatch.setattr(Ranks, "first_does", lambda self, work: work() or "")
        monkeypatch.setattr(Ranks, "wait", lambda self: None)
    written(pictures, tmp_path / "out", ranks=ranks[1])
    assert [path.name[:15] for path in (tmp_path / "out").glob("features-*")] == ["features-000001"]
    held = written(pictures, tmp_path / "out", ranks=ranks[0])
    assert held["sample"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7] or held["sample"].tolist() == list(range(10))


def test_parquet_has_a_row_a_picture(pictures: ShardIndex, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    held = written(pictures, tmp_path / "plain")
    written(pictures, tmp_path / "out", form="parquet")
    table = parquet.read_table(next((tmp_path / "out").glob("*.parquet")))
    assert table["key"].to_pylist() == [f"picture{i}" for i in range(10)]
    assert np.allclose(np.stack(table["mean"].to_numpy()), held["mean"].numpy())
    assert json.loads(table.schema.metadata[b"tokens"]) == list(held["tokens"].shape[1:])
    assert np.allclose(np.stack(table["tokens"].to_numpy()).reshape(held["tokens"].shape), held["tokens"].numpy())
