"""What is learned from views: the encoder, the objectives, the run, and how good its result is.

Here: the table of contents. A name is imported when it is asked for: the processes that render the demo's pictures need no timm.
A type checker sees plain imports.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for who reads and does not run
    from wherefrom.pipeline.demo.shards import DemoShards, demo_shards
    from wherefrom.train.encoder import Encoder, Features, ModelSettings
    from wherefrom.train.evaluation.labels import evaluate_labels
    from wherefrom.train.evaluation.pairs import evaluate_pairs, pair_r2
    from wherefrom.train.evaluation.pictures import ShardPictures
    from wherefrom.train.loop import run
    from wherefrom.train.objective import Encode, Objective, Progress, Step, StepOutput, Terms
    from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings
    from wherefrom.train.objectives.spatial_dense import DenseSpatialPrediction, DenseSpatialSettings
    from wherefrom.train.recipes import RECIPES, recipe
    from wherefrom.train.reporting import Evaluated, LogRecord, Reporter, RunFacts, Silent, Summary
    from wherefrom.train.run_folder import RunFolder
    from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings, read_settings, write_settings
    from wherefrom.train.trainer import Trainer

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
    "evaluate_pairs": "evaluation.pairs",
    "pair_r2": "evaluation.pairs",
    "evaluate_labels": "evaluation.labels",
    "ShardPictures": "evaluation.pictures",
    "DemoShards": "wherefrom.pipeline.demo.shards",
    "demo_shards": "wherefrom.pipeline.demo.shards",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"wherefrom.train has no {name!r}; it has {', '.join(_HOMES)}")
    home = _HOMES[name]
    return getattr(importlib.import_module(home if home.startswith("wherefrom.") else f"wherefrom.train.{home}"), name)
