"""Networks to evaluate: a run's, an exported encoder, or one of timm or the Hub, and how each wants its pictures.

Here: what a source names, the settings by which it is built, its weights.
Not here: what is measured of it (one file a family of protocols), writing an encoder (export.py).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg

from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD
from wherefrom.train import checkpoint
from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.objective import random_scope
from wherefrom.train.plain_data import from_plain
from wherefrom.train.pretrained import load_weights
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.settings import read_plain_settings

Which = Literal["exported", "student"]
Triple = tuple[float, float, float]

HUB = "hf-hub:"
FOUND = "a run's folder, a folder with config.json and model.safetensors, hf-hub:OWNER/NAME, or a model of timm"
ARGUMENTS = {  # of timm, by our settings; others change a network in ways that they do not know
    "img_size": "view_size_px",
    "patch_size": "patch_size_px",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "drop_path_rate": "drop_path",
}
IMPLIED = ("dynamic_img_size", "fc_norm", "global_pool", "in_chans", "num_classes")  # those that an Encoder gives itself


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Network:
    """An encoder with its weights, not trained any further, and how it wants its pictures."""

    encoder: Encoder
    name: str  # where it comes from, for headings
    picture_px: int  # the side of whole pictures that it is shown, if nothing else is asked for
    mean: Triple  # of values in [0, 1]
    std: Triple

    @property
    def identity(self) -> str:
        """32 hexadecimal digits that change with any weight, with what the summary is, and with how pictures are handed over."""
        mean_of_tokens = self.encoder.has_class_token and self.encoder.settings.summary == "mean"  # else as "auto" takes it
        about = (self.encoder.settings.described(), self.mean, self.std, *(["summary mean"] if mean_of_tokens else []))
        digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
        for name, tensor in self.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def px(self, asked: int | None) -> int:
        """Return the side of whole pictures: as asked for, by default the network's own.

        Raises: ValueError if it is below 1.
        """
        if asked is not None and asked < 1:
            raise ValueError(f"picture_px={asked}: the side of whole pictures needs at least 1 px; leave it out for the network's own")
        return self.picture_px if asked is None else asked


def open_network(source: str, *, which: Which = "exported") -> Network:
    """Return the network that a source names, on the processor: FOUND says what there is.

    which: of a run, the network that it exports (the teacher, where its host prefers it), or the student of its newest checkpoint.
    Raises: ValueError in one line if there is no such network, it cannot be built, or nothing says how it wants its pictures.
    """
    folder = Path(source)
    if RunFolder(folder).settings.is_file():
        return _of_run(RunFolder(folder), which)
    if which == "student":
        raise ValueError(f"{source}: only a run has a student beside what it exports; name a run's folder")
    if (folder / "config.json").is_file():
        return _of_folder(folder, source)
    if source.startswith(HUB):
        return _of_folder(_downloaded(source.removeprefix(HUB)), source)
    if timm.is_model(source):
        return _of_timm(source)
    raise ValueError(f"{source}: no network; name {FOUND}")


def _of_run(folder: RunFolder, which: Which) -> Network:
    settings = from_plain(ModelSettings(), read_plain_settings(folder.settings).get("model", {}), "model")
    encoder = Encoder(replace(settings, weights=None, drop_path=0.0))
    if which == "exported":
        if not (folder.model / "config.json").is_file():
            raise ValueError(f"{folder.path}: the run has not come to its end and exports nothing yet; take the student, or let it end")
        load_weights(encoder, str(folder.path))
        return _wanting(encoder, _config(folder.model), folder.model, str(folder.path))
    newest = checkpoint.latest(folder.checkpoints)
    if newest is None:
        raise ValueError(f"{folder.path}: no checkpoint was saved yet; there is no student")
    prefix = "encoder."
    held = load_file(newest / "weights.safetensors")
    encoder.load_state_dict({name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)})
    position = checkpoint.read_state(newest).settings
    px = next(iter(position["objectives"].values()))["size_px"]
    normal = {"input_size": (3, px, px), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return _wanting(encoder, {"pretrained_cfg": normal}, newest, f"{folder.path} (student)")


def _of_folder(folder: Path, source: str) -> Network:
    config = _config(folder)
    encoder = Encoder(replace(_settings_of(config, folder), weights=None, drop_path=0.0))
    load_weights(encoder, str(folder))
    return _wanting(encoder, config, folder, source)


def _of_timm(name: str) -> Network:
    encoder = Encoder(ModelSettings(name=name))
    load_weights(encoder, name)
    known = get_pretrained_cfg(name)
    return _wanting(encoder, {"pretrained_cfg": {} if known is None else known.to_dict()}, Path(name), name)


def _downloaded(repository: str) -> Path:
    """Return the folder of a model's files from the Hub, as its cache holds them."""
    try:
        files = [Path(hf_hub_download(repository, name)) for name in ("config.json", "model.safetensors")]
    except (OSError, ValueError) as problem:
        raise ValueError(f"{HUB}{repository}: cannot be had: {' '.join(str(problem).split()):.200}") from None
    return files[0].parent


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path}: does not say what the network is ({problem}); name a folder that timm loads") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{path}: names no architecture of timm; name a folder that timm loads")
    return config


def _settings_of(config: Mapping[str, Any], folder: Path) -> ModelSettings:
    """Return the settings that build what a folder holds: as we wrote them, or by the arguments that timm builds it by."""
    ours = config.get("wherefrom")
    if isinstance(ours, dict) and isinstance(ours.get("model"), dict):
        return from_plain(ModelSettings(), ours["model"], f"{folder}/config.json: model")
    arguments = config.get("model_args") or {}
    known = {ARGUMENTS[name]: _one_of_equals(value) for name, value in arguments.items() if name in ARGUMENTS}
    others = sorted(set(arguments) - set(ARGUMENTS) - set(IMPLIED))
    if others:
        raise ValueError(f"{folder}/config.json: model_args has {', '.join(others)}, which no encoder here takes; take another network")
    mean = {"summary": "mean"} if arguments.get("global_pool", config.get("global_pool")) == "avg" else {}
    return from_plain(ModelSettings(name=config["architecture"]), known | mean, f"{folder}/config.json")


def _one_of_equals(value: Any) -> Any:
    """Return the side of a square, which timm may write as two numbers."""
    return value[0] if isinstance(value, list) and len({*value}) == 1 else value


def _wanting(encoder: Encoder, config: Mapping[str, Any], where: Path, name: str) -> Network:
    """Return an encoder as a network that wants its pictures as a configuration of timm says."""
    wants = config.get("pretrained_cfg") or {}
    missing = [key for key in ("mean", "std", "input_size") if not wants.get(key)]
    if missing:
        raise ValueError(f"{where}: says no {' and no '.join(missing)} under pretrained_cfg; write down there what its pictures are given")
    frozen = encoder.requires_grad_(False).eval()
    mean, std = (_triple(wants[key]) for key in ("mean", "std"))
    return Network(encoder=frozen, name=name, picture_px=int(wants["input_size"][-1]), mean=mean, std=std)


def _triple(numbers: Any) -> Triple:
    red, green, blue = map(float, numbers)
    return red, green, blue


def random_network(encoder: Encoder, seed: int) -> Encoder:
    """Return the architecture of an encoder with random weights, on its device: a floor."""
    with random_scope(seed, "random encoder"):
        return Encoder(encoder.settings).requires_grad_(False).eval().to(next(encoder.parameters()).device)
