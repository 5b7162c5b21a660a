"""What is learned from views: the encoder, the objectives, the run, and how good its result is."""

from wherefrom.train.encoder import Encoder, Features, ModelSettings
from wherefrom.train.evaluation.features import Evaluation, Part
from wherefrom.train.evaluation.labels import evaluate_labels
from wherefrom.train.evaluation.network import Network, open_network
from wherefrom.train.evaluation.pairs import evaluate_pairs, pair_r2
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.protocols import PROTOCOLS, Measured, NotMeasuredError, PairExample, Score, measure, protocols_named
from wherefrom.train.loop import run
from wherefrom.train.objective import (
    OBJECTIVES,
    Encode,
    Objective,
    ObjectiveSettings,
    Panel,
    ParameterRule,
    Progress,
    Step,
    StepOutput,
    Terms,
)
from wherefrom.train.objectives.barlow import BarlowTwins, BarlowTwinsSettings
from wherefrom.train.objectives.byol import BYOL, BYOLSettings
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.colorization import Colorization, ColorizationSettings
from wherefrom.train.objectives.context import Context, ContextSettings
from wherefrom.train.objectives.dino import DINO, DINOSettings
from wherefrom.train.objectives.gtsa import GTSA, GTSASettings
from wherefrom.train.objectives.jigsaw import Jigsaw, JigsawSettings
from wherefrom.train.objectives.mae import MAE, MAESettings
from wherefrom.train.objectives.moco_v3 import MoCoV3, MoCoV3Settings
from wherefrom.train.objectives.pairs import PairObjective, is_pair_objective
from wherefrom.train.objectives.part import PART, PARTSettings
from wherefrom.train.objectives.rotation import Rotation, RotationSettings
from wherefrom.train.objectives.simclr import SimCLR, SimCLRSettings
from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings
from wherefrom.train.objectives.spatial_dense import DenseSpatialPrediction, DenseSpatialSettings
from wherefrom.train.objectives.teacher import follow
from wherefrom.train.objectives.tiles import TileGuards
from wherefrom.train.objectives.vicreg import VICReg, VICRegSettings
from wherefrom.train.over_ranks import batch_norm_over_ranks, gathered, mean_over_ranks, own_rank, rank_count
from wherefrom.train.recipes import RECIPES, recipe
from wherefrom.train.replay import Replay, open_replay, replayed_batch
from wherefrom.train.reporting import EvaluationResults, LogRecord, Reporter, RunFacts, Summary
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.schedule import cosine, ramp
from wherefrom.train.settings import (
    EvaluationSettings,
    IndexSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
    read_settings,
    write_settings,
)
from wherefrom.train.trainer import Trainer

__all__ = [  # in reading order  # noqa: RUF022
    "recipe",
    "RECIPES",
    "run",
    "TrainSettings",
    "ModelSettings",
    "SpatialSettings",
    "DenseSpatialSettings",
    "PARTSettings",
    "GTSASettings",
    "DINOSettings",
    "MoCoV3Settings",
    "SimCLRSettings",
    "BYOLSettings",
    "BarlowTwinsSettings",
    "VICRegSettings",
    "MAESettings",
    "RotationSettings",
    "ContextSettings",
    "JigsawSettings",
    "TileGuards",
    "ColorizationSettings",
    "OptimSettings",
    "EvaluationSettings",
    "IndexSettings",
    "RuntimeSettings",
    "read_settings",
    "write_settings",
    "Encoder",
    "Features",
    "Objective",
    "ObjectiveSettings",
    "OBJECTIVES",
    "Encode",
    "Terms",
    "Progress",
    "ParameterRule",
    "Panel",
    "Step",
    "StepOutput",
    "cosine",
    "ramp",
    "follow",
    "spread",
    "gathered",
    "mean_over_ranks",
    "batch_norm_over_ranks",
    "rank_count",
    "own_rank",
    "SpatialPrediction",
    "DenseSpatialPrediction",
    "PART",
    "GTSA",
    "DINO",
    "MoCoV3",
    "SimCLR",
    "BYOL",
    "BarlowTwins",
    "VICReg",
    "MAE",
    "Rotation",
    "Context",
    "Jigsaw",
    "Colorization",
    "Trainer",
    "RunFolder",
    "replayed_batch",
    "open_replay",
    "Replay",
    "Reporter",
    "LogRecord",
    "EvaluationResults",
    "RunFacts",
    "Summary",
    "PairObjective",
    "is_pair_objective",
    "evaluate_pairs",
    "pair_r2",
    "evaluate_labels",
    "Network",
    "open_network",
    "Evaluation",
    "Part",
    "PROTOCOLS",
    "protocols_named",
    "measure",
    "Measured",
    "PairExample",
    "Score",
    "NotMeasuredError",
    "ShardPictures",
]
