"""The trained encoder, written out for others: a folder that timm loads, and the same weights by themselves.

Here: its weights, and what timm reads beside them: architecture, views, where the weights come from.
Not here: checkpoints, which a run goes on from (checkpoint.py); where the files lie (run_folder.py).
"""

import importlib.metadata
import json
from dataclasses import replace

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.train.disk import save_weights
from wherefrom.train.encoder import Encoder
from wherefrom.train.plain_data import Plain, to_plain
from wherefrom.train.pretrained import origin
from wherefrom.train.run_folder import RunFolder, replace_text
from wherefrom.train.settings import TrainSettings


def write_encoder(
    folder: RunFolder, encoder: Encoder, recipe: ViewRecipe, *, settings: TrainSettings, data: str, network: str = "encoder"
) -> None:
    """Write the trained encoder for others: `timm.create_model("local-dir:RUN/encoder", pretrained=True)` loads it.

    encoder.safetensors holds the same weights by themselves. What timm knows of weights of its own under the model's name is left out:
    these are of a run, on `data` (the shards' fingerprint), of views as `recipe` hands them over. `network`: "encoder", or "teacher".
    """
    folder.model.mkdir(exist_ok=True)
    replace_text(folder.model / "config.json", json.dumps(_config(encoder, recipe, settings, data, network), indent=1) + "\n")
    weights = encoder.model.state_dict()
    for path in (folder.model / "model.safetensors", folder.encoder):
        with write_aside(path) as aside:
            save_weights(aside, weights)


def _config(encoder: Encoder, recipe: ViewRecipe, settings: TrainSettings, data: str, network: str) -> dict[str, Plain]:
    """Return what timm reads of a model folder, and where the weights come from."""
    started_from = settings.model.weights
    arguments, theirs = encoder.settings.timm_arguments(), encoder.model.pretrained_cfg
    architecture = arguments.pop("model_name").partition(".")[0]  # what follows a dot names weights, and these are others
    return {
        "architecture": architecture,
        "num_classes": arguments.pop("num_classes"),
        "num_features": encoder.width,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": f"wherefrom_{settings.recipe}",
            "custom_load": False,
            "input_size": (3, settings.view_px, settings.view_px),
            "fixed_input_size": encoder.only_hw is not None,
            "interpolation": "bilinear",
            "mean": recipe.mean,
            "std": recipe.std,
            "num_classes": 0,
            "first_conv": theirs.get("first_conv"),  # of the architecture, as the next: timm asks for them to change channels or classes
            "classifier": theirs.get("classifier"),
        },
        "wherefrom": {
            "version": importlib.metadata.version("wherefrom"),
            "recipe": settings.recipe,
            "seed": settings.seed,
            "data": data,
            "views": recipe.fingerprint,
            "network": network,
            "model": to_plain(replace(encoder.settings, name=architecture, weights=None)),  # also how positions are had at other sizes
        }
        | ({} if started_from is None else {"weights": {"from": started_from, "of": origin(started_from)}}),
    }
