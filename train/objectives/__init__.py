"""What is learned from views: one file a method. The interface they share is wherefrom.train.objective."""

from wherefrom.train.objectives.barlow import BarlowTwins, BarlowTwinsSettings
from wherefrom.train.objectives.byol import BYOL, BYOLSettings
from wherefrom.train.objectives.colorization import Colorization, ColorizationSettings
from wherefrom.train.objectives.context import Context, ContextSettings
from wherefrom.train.objectives.dino import DINO, DINOSettings
from wherefrom.train.objectives.gtsa import GTSA, GTSASettings
from wherefrom.train.objectives.jigsaw import Jigsaw, JigsawSettings
from wherefrom.train.objectives.mae import MAE, MAESettings
from wherefrom.train.objectives.moco_v3 import MoCoV3, MoCoV3Settings
from wherefrom.train.objectives.part import PART, PARTSettings
from wherefrom.train.objectives.rotation import Rotation, RotationSettings
from wherefrom.train.objectives.simclr import SimCLR, SimCLRSettings
from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings
from wherefrom.train.objectives.spatial_dense import DenseSpatialPrediction, DenseSpatialSettings
from wherefrom.train.objectives.tiles import TileGuards
from wherefrom.train.objectives.vicreg import VICReg, VICRegSettings

__all__ = [
    "BYOL",
    "DINO",
    "GTSA",
    "MAE",
    "PART",
    "BYOLSettings",
    "BarlowTwins",
    "BarlowTwinsSettings",
    "Colorization",
    "ColorizationSettings",
    "Context",
    "ContextSettings",
    "DINOSettings",
    "DenseSpatialPrediction",
    "DenseSpatialSettings",
    "GTSASettings",
    "Jigsaw",
    "JigsawSettings",
    "MAESettings",
    "MoCoV3",
    "MoCoV3Settings",
    "PARTSettings",
    "Rotation",
    "RotationSettings",
    "SimCLR",
    "SimCLRSettings",
    "SpatialPrediction",
    "SpatialSettings",
    "TileGuards",
    "VICReg",
    "VICRegSettings",
]
