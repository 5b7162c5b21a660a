"""Networks to evaluate, against timm's own loading of the same folders, and what is said of folders that hold none."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from host_runs import METHODS, method_run
from timm.models import save_for_hf

from wherefrom.train import Reporter, run
from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.evaluation import network as network_module
from wherefrom.train.evaluation.network import open_network
from wherefrom.train.settings import TrainSettings

pytestmark = pytest.mark.core

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def teacher_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DINO, whose teacher is exported."""
    folder = tmp_path_factory.mktemp("runs") / "dino"
    run(method_run("dino", tiny_shards, updates=3), reporter=Reporter(), out=folder)
    return folder


def saved_by_timm(folder: Path, **arguments: Any) -> tuple[Path, Any]:
    """Write a small ViT as timm writes models for the Hub; return the folder and the model."""
    torch.manual_seed(2)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, **SMALL, **arguments)
    config = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    model.pretrained_cfg.update(config)
    save_for_hf(model, str(folder), model_config=config, model_args=SMALL | arguments, safe_serialization=True)
    return folder, model.eval()


def test_of_a_run_teacher_and_student_are_had(teacher_run: Path) -> None:
    exported, student = open_network(str(teacher_run)), open_network(str(teacher_run), which="student")
    theirs = timm.create_model(f"local-dir:{teacher_run / 'encoder'}", pretrained=True).state_dict()
    ours = exported.encoder.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert exported.identity != student.identity
    assert exported.picture_px == student.picture_px == 24
    assert exported.encoder.settings == replace(METHODS["dino"].model, drop_path=0.0)
    assert open_network(str(teacher_run / "encoder")).identity == exported.identity
    assert not any(parameter.requires_grad for parameter in exported.encoder.parameters())


def test_identity_changes_with_a_weight_and_with_how_pictures_come(teacher_run: Path) -> None:
    network = open_network(str(teacher_run))
    before = network.identity
    assert replace(network, mean=(0.5, 0.5, 0.5)).identity != before
    with torch.no_grad():
        next(network.encoder.parameters()).view(-1)[0] += 1e-3
    assert network.identity != before


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_folder_of_timm_gives_timms_features(tmp_path: Path, pool: str) -> None:
    folder, model = saved_by_timm(tmp_path / "theirs", global_pool=pool, fc_norm=False, dynamic_img_size=True)
    network = open_network(str(folder))
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        summary = network.encoder.eval().encode(pixels[:, None]).summary[:, 0]
        assert torch.allclose(summary, model(pixels), atol=1e-6)
        assert not torch.allclose(summary, model(pixels + 0.1), atol=1e-3)  # control
    assert (network.mean, network.std, network.picture_px) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 32)


def test_the_hub_is_a_folder_that_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved_by_timm(tmp_path / "theirs")
    asked: list[tuple[str, str]] = []

    def fetched(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(folder / name)

    monkeypatch.setattr(network_module, "hf_hub_download", fetched)
    assert open_network("hf-hub:someone/vit").identity == open_network(str(folder)).identity
    assert asked == [("someone/vit", "config.json"), ("someone/vit", "model.safetensors")]


def test_what_no_encoder_can_be_made_of_is_named(tmp_path: Path, tiny_shards: Path, teacher_run: Path) -> None:
    folder, _ = saved_by_timm(tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())

    def with_config(**changes: Any) -> str:
        (folder / "config.json").write_text(json.dumps(config | changes))
        return str(folder)

    unfinished = tmp_path / "unfinished"
    settings: TrainSettings = method_run("rotation", tiny_shards, updates=3)
    run(replace(settings, updates=1), reporter=Reporter(), out=unfinished)
    (unfinished / "encoder" / "config.json").unlink()
    cases = [
        (str(tmp_path / "absent"), {}, r"absent: no network; name a run's folder, a folder with config.json"),
        (str(tmp_path / "theirs"), {"which": "student"}, "only a run has a student"),
        (str(unfinished), {}, "the run has not come to its end and exports nothing yet; take the student, or let it end"),
    ]
    for source, options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_network(source, **options)
    wants = {name: value for name, value in config["pretrained_cfg"].items() if name not in ("mean", "std")}
    with pytest.raises(ValueError, match="says no mean and no std under pretrained_cfg; write down there"):
        open_network(with_config(pretrained_cfg=wants))
    with pytest.raises(ValueError, match="model_args has init_values, which no encoder here takes"):
        open_network(with_config(model_args=SMALL | {"init_values": 1e-5}))
    with pytest.raises(ValueError, match="names no architecture of timm"):
        open_network(with_config(architecture=None))
    with pytest.raises(ValueError, match=r"there and .* in vit_small_patch16_224"):
        open_network(with_config(model_args=SMALL | {"embed_dim": 64}))
    assert open_network(str(unfinished), which="student").picture_px == 24


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "resnet10t"])
def test_last_layers_end_with_what_encode_gives_and_are_timms(name: str) -> None:
    vit = name.startswith("vit")
    settings = ModelSettings(name=name, **({"view_size_px": 32, "patch_size_px": 8, "width": 32, "depth": 4, "heads": 2} if vit else {}))
    encoder = Encoder(settings).eval()
    pixels = torch.randn(2, 3, 3, 48, 32)  # other than the position table's
    with torch.no_grad():
        layers, whole = encoder.last_layers(pixels, 3 if vit else 1), encoder.encode(pixels)
        assert all(torch.equal(getattr(layers[-1], part), getattr(whole, part)) for part in ("summary", "tokens"))
        if vit:
            theirs = encoder.model.forward_intermediates(pixels.flatten(0, 1), indices=3, norm=True, intermediates_only=True)
            for ours, other in zip(layers, theirs, strict=True):
                assert torch.allclose(ours.tokens.flatten(0, 1).movedim(-1, 1), other, atol=1e-5)
            assert not torch.allclose(layers[0].tokens, layers[1].tokens, atol=1e-2)  # control
    with pytest.raises(ValueError, match=f"the last 9 layers of model '{name}': it has {4 if vit else 1}"):
        encoder.last_layers(pixels, 9)
