"""Folder trees of very many files: arrays alone, in bounded time and memory."""

import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wherefrom.pipeline.shards.index import ShardIndex

LONG_AGO = 10**18  # ns


@pytest.fixture
def picture(jpeg_bytes: Callable[..., bytes]) -> bytes:
    return jpeg_bytes(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), quality=40)


def plant(root: Path, files: int, picture: bytes) -> Path:
    """Write thousands of files into folders of a thousand that look old."""
    for number in range(files // 1000):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        for place in range(1000):
            (folder / f"n{number:08d}_{place}.JPEG").write_bytes(picture)
        os.utime(folder, ns=(LONG_AGO, LONG_AGO))
    os.utime(root, ns=(LONG_AGO, LONG_AGO))
    return root


def peak_of_indexing(root: Path) -> int:
    """Index a tree from its files; return the most bytes that this took at once."""
    tracemalloc.start()
    try:
        index = ShardIndex.open(root, rebuild=True)
        assert index.invalid_count == 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BYTES_A_FILE = 270  # names and columns thrice; a Python object a file would be another seventy


@pytest.mark.core
def test_thousands_of_files_take_arrays_alone(tmp_path: Path, picture: bytes) -> None:
    root = plant(tmp_path / "some", 4000, picture)
    assert peak_of_indexing(root) < 3e6 + BYTES_A_FILE * 4000


@pytest.mark.slow
def test_a_hundred_thousand_files_are_indexed_in_bounded_time_and_memory(tmp_path: Path, picture: bytes) -> None:
    root = plant(tmp_path / "many", 100_000, picture)
    start = time.perf_counter()
    assert len(ShardIndex.open(root)) == 100_000
    assert time.perf_counter() - start < 100_000 / 1_280_000 * 5 * 60  # five minutes for 1.28 million
    start = time.perf_counter()
    assert ShardIndex.open(root).reused == 1
    assert time.perf_counter() - start < 5
    assert peak_of_indexing(root) < 3e6 + BYTES_A_FILE * 100_000


def index_empty_files(root: Path, files: int, picture: bytes) -> None:
    root.mkdir()
    for number in range(files):
        os.close(os.open(root / f"{number:06d}.jpg", os.O_CREAT))
    (root / "x.jpg").write_bytes(picture)
    start = time.perf_counter()
    index = ShardIndex.open(root)
    assert time.perf_counter() - start < 3 + files * 2e-4
    assert index.invalid_count == files and index.reason(0) == "is empty"
    assert index.replacement(np.arange(5)).tolist() == [files] * 5


@pytest.mark.core
def test_empty_files_are_invalid_in_bounded_time(tmp_path: Path, picture: bytes) -> None:
    index_empty_files(tmp_path / "empty", 3000, picture)


@pytest.mark.slow
def test_a_hundred_thousand_empty_files_are_invalid_in_bounded_time(tmp_path: Path, picture: bytes) -> None:
    index_empty_files(tmp_path / "empty", 100_000, picture)
