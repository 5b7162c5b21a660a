"""What is learned from views: one file a method. The interface they share is wherefrom.train.objective."""

from wherefrom.train.objectives.mae import MAE, MAESettings
from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings
from wherefrom.train.objectives.spatial_dense import DenseSpatialPrediction, DenseSpatialSettings

__all__ = ["MAE", "DenseSpatialPrediction", "DenseSpatialSettings", "MAESettings", "SpatialPrediction", "SpatialSettings"]
