"""What is learned from views: the encoder, the objectives, the run, and how good its result is.

Here: the table of contents. A name is imported when it is asked for: the processes that render the demo's pictures need no timm.
"""

import importlib
from typing import Any

_HOMES = {
    "recipe": "recipes",
    "RECIPES": "recipes",
    "run": "loop",
    "TrainSettings": "settings",
    "ModelSettings": "encoder",
    "SpatialSettings": "objectives.spatial",
    "DenseSpatialSettings": "objectives.spatial_dense",
    "OptimSettings": "settings",
    "EvaluationSettings": "settings",
    "RuntimeSettings": "settings",
    "read_settings": "settings",
    "write_settings": "settings",
    "Encoder": "encoder",
    "Features": "encoder",
    "Objective": "objective",
    "Encode": "objective",
    "Terms": "objective",
    "Progress": "objective",
    "Step": "objective",
    "StepOutput": "objective",
    "SpatialPrediction": "objectives.spatial",
    "DenseSpatialPrediction": "objectives.spatial_dense",
    "Trainer": "trainer",
    "RunFolder": "run_folder",
    "Reporter": "reporting",
    "Silent": "reporting",
    "LogRecord": "reporting",
    "Evaluated": "reporting",
    "RunFacts": "reporting",
    "Summary": "reporting",
    "evaluate_pairs": "pair_geometry",
    "pair_r2": "pair_geometry",
    "evaluate_labels": "evaluate",
    "ShardPictures": "evaluate",
    "DemoShards": "demo_data",
    "demo_shards": "demo_data",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"wherefrom.train has no {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"wherefrom.train.{_HOMES[name]}"), name)
