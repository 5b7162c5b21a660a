"""The embedded default pictures: scenes that are drawn on the spot, and the shards made of them."""
