"""What is learned from views: one file a method. The interface they share is wherefrom.train.objective."""

from wherefrom.train.objectives.barlow import BarlowTwins, BarlowTwinsSettings
from wherefrom.train.objectives.byol import BYOL, BYOLSettings
from wherefrom.train.objectives.simclr import SimCLR, SimCLRSettings
from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings
from wherefrom.train.objectives.spatial_dense import DenseSpatialPrediction, DenseSpatialSettings
from wherefrom.train.objectives.vicreg import VICReg, VICRegSettings

__all__ = [
    "BYOL",
    "BYOLSettings",
    "BarlowTwins",
    "BarlowTwinsSettings",
    "DenseSpatialPrediction",
    "DenseSpatialSettings",
    "SimCLR",
    "SimCLRSettings",
    "SpatialPrediction",
    "SpatialSettings",
    "VICReg",
    "VICRegSettings",
]
