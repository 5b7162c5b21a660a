"""What is learned from views: one file a method. The interface they share is wherefrom.train.objective."""

from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings

__all__ = ["SpatialPrediction", "SpatialSettings"]
