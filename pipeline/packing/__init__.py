"""Packing: any source of pictures -> tar shards for every reader of WebDataset."""
