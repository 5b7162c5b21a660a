"""Weights to start from: those of an earlier run, of an exported encoder, or of timm.

Here: where they lie, whether they fit the model, where they say that they come from.
Not here: checkpoints, which a run goes on from (checkpoint.py); writing an encoder for others (export.py).
"""

import json
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.plain_data import Plain
from wherefrom.train.run_folder import RunFolder

TIMM = "timm"  # those that timm has for the model's name


def load_weights(encoder: Encoder, source: str) -> None:
    """Put weights into an encoder: a run's or an exported encoder's folder, "timm", or the name of timm's for other ones than the model's.

    A learned position table is resampled to the model's grid; a fixed one stays what it is.
    Raises: ValueError in one line if there are none, or they are not of this model.
    """
    theirs = _of_folder(encoder, source) if _folder(source) is not None else _of_timm(encoder.settings, source)
    own = encoder.model.state_dict()
    if isinstance(encoder.model, VisionTransformer) and "pos_embed" in theirs and "pos_embed" in own:
        learned = encoder.settings.positions == "learned"
        theirs["pos_embed"] = _resampled(encoder.model, theirs["pos_embed"]) if learned else own["pos_embed"]
    for name in own | theirs:
        here, there = (str(tuple(held[name].shape)) if name in held else "absent" for held in (own, theirs))
        if here != there:
            raise ValueError(
                f"model.weights={source!r}: {name} is {there} there and {here} in {encoder.settings.described()}; "
                "give the model that they are of"
            )
    encoder.model.load_state_dict(theirs)


def origin(source: str) -> Plain:
    """Return what weights say of themselves: of an exported encoder its run, None where they say nothing or are no longer there."""
    folder = _folder(source)
    if folder is None:
        return None
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("wherefrom")
    except (OSError, json.JSONDecodeError, AttributeError):
        return None


def _folder(source: str) -> Path | None:
    """Return the folder that timm would load, if the source is one, or a run's."""
    places = (RunFolder(Path(source)).model, Path(source))
    return next((place for place in places if (place / "model.safetensors").is_file()), None)


def _of_folder(encoder: Encoder, source: str) -> dict[str, Tensor]:
    folder = _folder(source)
    assert folder is not None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        theirs, weights = str(config["architecture"]), load_file(folder / "model.safetensors")
    except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as problem:
        raise ValueError(f"model.weights={source!r}: {folder} is no exported encoder ({problem}); name another") from None
    _refuse_another(encoder.settings, source, theirs)
    return weights


def _of_timm(settings: ModelSettings, source: str) -> dict[str, Tensor]:
    if source != TIMM and not timm.is_model(source):
        raise ValueError(
            f"model.weights={source!r}: no folder with model.safetensors, which a run writes at its end, and no model of timm; "
            "name a run's folder, an exported encoder's, or 'timm'"
        )
    name = settings.name if source == TIMM else source
    _refuse_another(settings, source, name)
    try:
        return timm.create_model(**settings.timm_arguments() | {"model_name": name}, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise ValueError(f"model.weights={source!r}: timm's of {name!r} cannot be had: {reason:.200}") from None


def _refuse_another(settings: ModelSettings, source: str, theirs: str) -> None:
    """Raise ValueError if weights are of another architecture; what follows a dot only tells weights of one apart."""
    if theirs.partition(".")[0] != settings.name.partition(".")[0]:
        raise ValueError(f"model.weights={source!r}: weights of {theirs!r}, the model is {settings.name!r}; take one of the two for both")


def _resampled(vit: VisionTransformer, table: Tensor) -> Tensor:
    """Return a position table for the model's grid; one that is for this grid, or no square, as it is."""
    if vit.pos_embed is None or table.shape == vit.pos_embed.shape or table.ndim != 3:
        return table
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    side = round((table.shape[1] - prefix) ** 0.5)
    if side * side != table.shape[1] - prefix:
        return table
    return resample_abs_pos_embed(table, new_size=list(vit.patch_embed.grid_size), old_size=[side, side], num_prefix_tokens=prefix)
