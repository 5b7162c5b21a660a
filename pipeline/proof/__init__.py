"""The pixel proof: that the source point which a record names is the one that the pixel shows."""
