"""Weights to start from, against the tensors of the run that they come from; timm's own stand in for those of its network."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from wherefrom.pipeline import Disjoint, ShardIndex, ViewRecipe
from wherefrom.train import (
    Encoder,
    ModelSettings,
    Reporter,
    RunFolder,
    RuntimeSettings,
    SpatialSettings,
    Trainer,
    TrainSettings,
    recipe,
    run,
)
from wherefrom.train.export import write_encoder
from wherefrom.train.loop import accelerator_for
from wherefrom.train.plain_data import unchecked
from wherefrom.train.pretrained import load_weights
from wherefrom.train.settings import read_settings, settled, with_its_own_model

pytestmark = pytest.mark.core

VIT = ModelSettings(name="vit_small_patch16_224", view_size_px=24, patch_size_px=12, width=32, depth=1, heads=2)


def settings_of(shards: Path, **model: Any) -> TrainSettings:
    """Return the settings of a run of one update."""
    return TrainSettings(
        recipe="demo",
        data=str(shards / "train.tar"),
        global_batch=8,
        updates=1,
        model=dataclasses.replace(VIT, **model),
        objectives={"spatial": SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16)), views=3, size_px=24, color=None, min_side_px=4)},
        runtime=RuntimeSettings(device="cpu", renderer="torch", threads=1, log_with="none"),
    )


def exported(folder: Path, settings: ModelSettings = VIT, seed: int = 5) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write an encoder, as a run does, with weights of a seed; return the run's folder and the weights."""
    torch.manual_seed(seed)
    encoder = Encoder(settings)
    folder.mkdir(parents=True)
    run_settings = TrainSettings(recipe="theirs", seed=seed, model=settings)
    views = ViewRecipe(families=run_settings.make_objectives()[0].families)
    write_encoder(RunFolder(folder), encoder, views, settings=run_settings, data="d4")
    return folder, encoder.model.state_dict()


@pytest.mark.parametrize("place", ["", "encoder"])
def test_a_run_starts_from_the_weights_of_another_and_says_so(place: str, tiny_shards: Path, tmp_path: Path) -> None:
    folder, theirs = exported(tmp_path / "theirs")
    settings = settings_of(tiny_shards, weights=str(folder / place))
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(settings, ShardIndex.open(settings.data), accelerator_for(settings))
    trainer.close()
    started = trainer.step.encoder.model.state_dict()
    assert all(torch.equal(started[name], theirs[name]) for name in theirs)
    out = tmp_path / "ours"
    run(settings, reporter=Reporter(), out=out)
    assert read_settings(RunFolder(out).settings, recipe("demo")).model.weights == str(folder / place)
    told = json.loads((RunFolder(out).model / "config.json").read_text())["wherefrom"]
    assert told["recipe"] == "demo"
    assert told["weights"]["from"] == str(folder / place)
    assert {name: told["weights"]["of"][name] for name in ("recipe", "seed", "data")} == {"recipe": "theirs", "seed": 5, "data": "d4"}
    # what is begun goes on without them
    ended = load_file(RunFolder(out).encoder)
    shutil.rmtree(folder)
    run(settings, reporter=Reporter(), out=out, resume=True)
    assert all(torch.equal(ended[name], value) for name, value in load_file(RunFolder(out).encoder).items())


def test_a_learned_table_is_resampled_and_a_fixed_one_stays(tmp_path: Path) -> None:
    folder, theirs = exported(tmp_path / "theirs")
    larger = Encoder(dataclasses.replace(VIT, view_size_px=48))
    load_weights(larger, str(folder))
    expected = resample_abs_pos_embed(theirs["pos_embed"], new_size=[4, 4], old_size=[2, 2], num_prefix_tokens=1)
    assert torch.equal(larger.model.pos_embed, expected)
    assert torch.equal(larger.model.blocks[0].attn.qkv.weight, theirs["blocks.0.attn.qkv.weight"])
    fixed = Encoder(dataclasses.replace(VIT, positions="sincos"))
    table = fixed.model.pos_embed.clone()
    load_weights(fixed, str(folder))
    assert torch.equal(fixed.model.pos_embed, table)
    assert torch.equal(fixed.model.cls_token, theirs["cls_token"])


@pytest.mark.parametrize(
    ("source", "name"), [("timm", "vit_small_patch16_224"), ("vit_small_patch16_224.dino", "vit_small_patch16_224.dino")]
)
def test_weights_of_timm_are_those_of_the_models_name_or_of_the_named(source: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def create_model(model_name: str, *, pretrained: bool = False, **arguments: Any) -> Any:
        asked.append((model_name, pretrained))
        torch.manual_seed(9)
        return create(model_name, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    encoder = Encoder(VIT)
    load_weights(encoder, source)
    assert asked == [("vit_small_patch16_224", False), (name, True)]


def test_a_random_encoder_stays_random_beside_one_that_started_from_weights(tmp_path: Path) -> None:
    folder, theirs = exported(tmp_path / "theirs")
    assert not torch.equal(Encoder(dataclasses.replace(VIT, weights=str(folder))).model.cls_token, theirs["cls_token"])


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = exported(tmp_path / "theirs")
    other, _ = exported(tmp_path / "resnet", ModelSettings(name="resnet10t"))
    broken, _ = exported(tmp_path / "broken")
    (broken / "encoder" / "model.safetensors").write_bytes(b"nothing")

    def offline(*_: object, **arguments: object) -> None:
        raise OSError("no network\nhere")

    for source, settings, message in (
        (folder, dataclasses.replace(VIT, depth=2), r"blocks\.1\.norm1\.weight is absent there and \(32,\) in vit_small_patch16_224 \("),
        (
            folder,
            dataclasses.replace(VIT, width=64),
            r"cls_token is \(1, 1, 32\) there and \(1, 1, 64\) in .*; give the model that they are",
        ),
        (folder, dataclasses.replace(VIT, patch_size_px=8), r"patch_embed\.proj\.weight is \(32, 3, 12, 12\) there"),
        (other, VIT, "weights of 'resnet10t', the model is 'vit_small_patch16_224'; take one of the two"),
        (broken, VIT, r"broken/encoder is no exported encoder \(.*\); name another"),
        (tmp_path / "none", VIT, "no folder with model.safetensors, which a run writes at its end, and no model of timm; name a"),
        ("vit_tiny_patch16_224", VIT, "weights of 'vit_tiny_patch16_224', the model is"),
        ("timm", VIT, "timm's of 'vit_small_patch16_224' cannot be had: no network here"),
    ):
        encoder = Encoder(settings)
        with monkeypatch.context() as patch:
            patch.setattr(timm, "create_model", offline)
            with pytest.raises(ValueError, match=message) as refused:
                load_weights(encoder, str(source))
        assert str(refused.value).startswith(f"model.weights={str(source)!r}: ") and "\n" not in str(refused.value)


def test_weights_go_with_their_model_and_fixed_positions_with_vits() -> None:
    base = dataclasses.replace(
        recipe("demo"), model=ModelSettings(positions="sincos", frozen=("patch_embed",), weights="timm", view_size_px=48)
    )
    for name, expected in (
        ("vit_tiny_patch16_224", ModelSettings(name="vit_tiny_patch16_224", positions="sincos", frozen=("patch_embed",), view_size_px=48)),
        ("resnet18", ModelSettings(name="resnet18")),
    ):
        stage = unchecked(base)
        stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, name=name))
        assert settled(with_its_own_model(stage, base, given={"name"})).model == expected
