"""Tar shards: which samples they hold, where each one's bytes lie, and reading them."""
