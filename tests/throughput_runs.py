"""The settings of a run that is profiled in about a second."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from wherefrom.pipeline.laws import Disjoint
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives.spatial import SpatialSettings
from wherefrom.train.settings import EvaluationSettings, RuntimeSettings, TrainSettings


def tiny_settings(shards: Path, **changes: Any) -> TrainSettings:
    """Return the settings of a tiny model on the shard in a folder, or on a folder of pictures."""
    data = shards / "train.tar"
    settings = TrainSettings(
        recipe="demo",
        data=str(data if data.is_file() else shards),
        global_batch=8,
        updates=6,
        model=ModelSettings(view_size_px=24, patch_size_px=12, width=32, depth=1, heads=2),
        objectives={"spatial": SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16)), views=4, size_px=24, color=None, min_side_px=4)},
        evaluation=EvaluationSettings(every=0),
        runtime=RuntimeSettings(device="cpu", renderer="torch", threads=1, log_every=1, checkpoint_every=100, log_with="none"),
    )
    return replace(settings, **changes)
