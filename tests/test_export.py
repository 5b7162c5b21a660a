"""The encoder that a run leaves for others: timm loads it, and it says where its weights come from, not where timm's own do."""

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config

from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.export import write_encoder
from wherefrom.train.objectives import SpatialSettings
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.settings import TrainSettings

pytestmark = pytest.mark.core

TINY_VIT = ModelSettings(name="vit_small_patch16_224", view_size_px=48, patch_size_px=12, width=32, depth=1, heads=2)
MODELS = {
    "vit": TINY_VIT,
    "vit of its own table": dataclasses.replace(TINY_VIT, view_size_px=None, patch_size_px=None),
    "vit, mean": dataclasses.replace(TINY_VIT, summary="mean"),
    "vit by the name of timm's weights": dataclasses.replace(TINY_VIT, name="vit_small_patch16_224.augreg_in21k_ft_in1k"),
    "convolutional": ModelSettings(name="resnet10t"),
}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def exported(model: ModelSettings, out: Path) -> tuple[Encoder, RunFolder]:
    settings = TrainSettings(recipe="mine", seed=5, model=model, objectives={"spatial": SpatialSettings(size_px=48)})
    torch.manual_seed(0)
    encoder, folder = Encoder(model).eval(), RunFolder(out)
    recipe = ViewRecipe(families=settings.make_objectives()[0].families, mean=MEAN, std=STD)
    write_encoder(folder, encoder, recipe, settings=settings, data="f1e2")
    return encoder, folder


@pytest.mark.parametrize("case", MODELS)
def test_timm_loads_the_same_network_and_how_to_show_it_pictures(case: str, tmp_path: Path) -> None:
    encoder, folder = exported(MODELS[case], tmp_path)
    loaded = timm.create_model(f"local-dir:{folder.model}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(pixels), encoder(pixels)[0])
    config = resolve_data_config(model=loaded)
    assert [tuple(config[name]) for name in ("input_size", "mean", "std")] == [(3, 48, 48), MEAN, STD]
    assert config["interpolation"] == "bilinear"
    # another head and gray pictures: timm asks the folder which layers these are
    other = timm.create_model(f"local-dir:{folder.model}", pretrained=True, num_classes=7, in_chans=1).eval()
    assert other(pixels[:, :1]).shape == (2, 7)


@pytest.mark.parametrize("case", MODELS)
def test_the_folder_says_where_its_weights_come_from_and_nothing_of_timms_own(case: str, tmp_path: Path) -> None:
    encoder, folder = exported(MODELS[case], tmp_path)
    text = (folder.model / "config.json").read_text()
    config = json.loads(text)
    assert config["pretrained_cfg"]["tag"] == "wherefrom_mine"
    assert (config["wherefrom"]["recipe"], config["wherefrom"]["seed"], config["wherefrom"]["data"]) == ("mine", 5, "f1e2")
    theirs = encoder.model.pretrained_cfg  # control: what a plain copy would say of other people's weights
    sources = {name: theirs[name] for name in ("url", "hf_hub_id", "tag", "origin_url", "paper_ids") if theirs.get(name)}
    assert sources
    assert [name for name, source in sources.items() if str(source) in text] == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_can_be_read_by_whom_the_umask_lets_read(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        _, folder = exported(TINY_VIT, tmp_path)
    finally:
        os.umask(before)
    files = [folder.encoder, *folder.model.iterdir()]
    assert sorted(path.name for path in files) == ["config.json", "encoder.safetensors", "model.safetensors"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
