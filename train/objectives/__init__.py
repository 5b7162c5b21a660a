"""What is learned from views: one file a method. The interface they share is wherefrom.train.objective."""

from wherefrom.train.objectives.dino import DINO, DINOSettings
from wherefrom.train.objectives.moco_v3 import MoCoV3, MoCoV3Settings
from wherefrom.train.objectives.simclr import SimCLR, SimCLRSettings
from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings
from wherefrom.train.objectives.spatial_dense import DenseSpatialPrediction, DenseSpatialSettings

__all__ = [
    "DINO",
    "DINOSettings",
    "DenseSpatialPrediction",
    "DenseSpatialSettings",
    "MoCoV3",
    "MoCoV3Settings",
    "SimCLR",
    "SimCLRSettings",
    "SpatialPrediction",
    "SpatialSettings",
]
