"""Parts of a file read in one call, against Python's own reads one by one: the same bytes, counts and errors, whatever the system gives."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wherefrom.kernels.read_parts import native_read_parts
from wherefrom.pipeline.shards import storage
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardChangedError, ShardReader
from wherefrom.pipeline.shards.storage import LocalStorage, read_parts

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[1]
needs_native = pytest.mark.skipif(native_read_parts() is None, reason="the compiled module was not built, or is older")


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let everything be read as where there is no compiler."""
    return lambda: monkeypatch.setattr(storage, "native_read_parts", lambda: None)


def random_parts(rng: np.random.Generator, size: int) -> NDArray[np.int64]:
    """Parts one behind the other in memory, of a file of so many bytes or, one case in three, of what would lie behind it."""
    lengths = rng.integers(0, 200, rng.integers(2, 9))
    offsets = rng.integers(0, size - 200, len(lengths))
    if rng.random() < 1 / 3:
        offsets[rng.integers(len(offsets))] = size - rng.integers(-50, 150)
    return np.stack([offsets, np.cumsum(lengths) - lengths, lengths], axis=1)


@needs_native
def test_one_call_reads_what_many_do(tmp_path: Path, one_by_one: Callable[[], None]) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "file"
    path.write_bytes(rng.bytes(5000))
    file, cases = LocalStorage().open(str(path)), [random_parts(rng, 5000) for _ in range(300)]

    def read_all() -> list[tuple[Any, bytes]]:
        memories = [np.full(int(parts[:, 2].sum()), 7, np.uint8) for parts in cases]
        return [(read_parts(file, memory, parts), memory.tobytes()) for memory, parts in zip(memories, cases, strict=True)]

    natively = read_all()
    one_by_one()
    assert natively == read_all()
    assert 50 < sum(told[0] < len(parts) for (told, _), parts in zip(natively, cases, strict=True)) < 150
    file.close()


@needs_native
@pytest.mark.parametrize(("fault", "number"), [("closed", errno.EBADF), ("folder", errno.EISDIR)])
def test_the_error_that_a_read_ends_with_is_pythons_own(tmp_path: Path, one_by_one: Callable[[], None], fault: str, number: int) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    if fault == "closed":
        os.close(descriptor)
    file, memory, parts = storage._LocalFile(descriptor), np.zeros(8, np.uint8), np.array([[0, 0, 0], [0, 0, 4], [4, 4, 4]])
    natively = read_parts(file, memory, parts)
    one_by_one()
    python = read_parts(file, memory, parts)
    first = 1 if fault == "folder" else 0  # a part of no bytes asks the system for nothing
    for whole, count, error in (natively, python):
        assert (count, type(error), error.errno, error.strerror) == (0, type(python[2]), number, os.strerror(number))  # type: ignore[union-attr]
        assert whole in (first, 1)
    if fault == "folder":
        os.close(descriptor)


@needs_native
def test_a_part_that_leaves_the_memory_or_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    with (tmp_path / "file").open("rb") as file:
        memory, native = np.full(10, 7, np.uint8), native_read_parts()
        assert native is not None
        most = 2**63 - 1
        for part in ((0, 0, 11), (0, 1, 10), (0, -1, 2), (0, 0, -1), (-1, 0, 1), (0, most, most), (0, 11, 0), (0, most, 1)):
            parts = np.array([part, (0, 0, 1)], np.int64)
            with pytest.raises(ValueError, match=r"^part 0 of -?\d+ bytes at -?\d+ leaves the memory of 10 bytes, or the file at -?\d+$"):
                native(file.fileno(), memory, parts)
        assert memory.tolist() == [7] * 10
        held = sys.getrefcount(memory), sys.getrefcount(parts)
        for wrong in ((memory, None), (None, parts), (bytes(10), parts), (memory, parts)):
            with pytest.raises((TypeError, ValueError, BufferError)):
                native(file.fileno(), *wrong)
        del wrong
        assert (sys.getrefcount(memory), sys.getrefcount(parts)) == held


@pytest.mark.parametrize("by", ["native", "python"])
def test_a_shard_that_was_cut_short_is_named_by_its_sample(
    tmp_path: Path,
    make_shard: Callable[..., Path],
    jpeg_bytes: Callable[..., bytes],
    one_by_one: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    pictures = [jpeg_bytes(np.full((20 + n, 30, 3), 40 * n, np.uint8)) for n in range(4)]
    shards = [make_shard(tmp_path / f"{s}.tar", [(f"k{n}", {"jpg": picture}) for n, picture in enumerate(pictures)]) for s in range(2)]
    index = ShardIndex.open(shards)
    if by == "python":
        one_by_one()
    with ShardReader(index) as reader:
        ids = np.array([5, 0, 3, 6, 2, 0])
        assert [data.tobytes() for data in reader.read_batch(ids)] == [pictures[sample % 4] for sample in ids]
        assert reader.read_batch(ids[:0]) == []
        os.truncate(shards[1], int(index.offset[6]) + 9)
        monkeypatch.setattr(ShardReader, "_check_unchanged", lambda *_: None)  # as if it happened behind the check
        with pytest.raises(ShardChangedError, match=rf"^{shards[1]}:k2: 9 of its {len(pictures[2])} bytes are there; restore the shard"):
            reader.read_batch(ids)
        monkeypatch.setattr(os, "strerror", lambda _: "words of the system")
        failing = OSError(errno.EIO, "words of the system")
        monkeypatch.setattr(storage, "native_read_parts", lambda: lambda *_: (1, 0, errno.EIO))
        monkeypatch.setattr(storage._LocalFile, "read_parts", lambda *_: (1, 0, failing))
        with pytest.raises(ShardChangedError, match=rf"^{shards[1]}:k2: words of the system; restore the shard"):
            reader.read_batch(ids)
        failing = OSError(errno.EMFILE, "too many")
        with pytest.raises(OSError, match="too many") as caught:
            reader.read_batch(ids)
        assert not isinstance(caught.value, ShardChangedError)


CHOPPY = """
#include <errno.h>
#include <string.h>
#include <sys/types.h>
static int calls;
static ssize_t choppy_pread(int most, void *to, size_t bytes, off_t offset)
{
    if (++calls % 3 == 0 || most < 0) {
        errno = most < 0 ? EIO : EINTR;
        return -1;
    }
    const size_t got = bytes < (size_t)most ? bytes : (size_t)most;
    memset(to, (int)offset, got);
    return (ssize_t)got;
}
#define pread choppy_pread
#include "read_parts.c"
"""


def test_reads_go_on_where_the_system_gives_little_or_is_interrupted(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "choppy.so"
    command = [compiler, "-std=gnu11", "-shared", "-fPIC", "-x", "c", "-", "-I", str(ROOT / "kernels"), "-o", str(library)]
    subprocess.run(command, input=CHOPPY, text=True, check=True, capture_output=True)
    read = ctypes.CDLL(str(library)).wf_read_parts
    parts, memory = np.array([[3, 0, 7], [90, 9, 5], [50, 7, 2], [0, 14, 0]]), np.full(16, 255, np.uint8)
    whole, count, interrupted = ctypes.c_int64(0), ctypes.c_int64(0), 0
    arguments = memory.ctypes.data_as(ctypes.c_void_p), parts.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(parts))
    while (error := read(2, *arguments, ctypes.byref(whole), ctypes.byref(count))) == errno.EINTR:
        interrupted += 1
    assert (error, whole.value, count.value) == (0, 4, 0) and interrupted > 1
    assert memory.tolist() == [3, 3, 5, 5, 7, 7, 9, 50, 50, 90, 90, 92, 92, 94, 255, 255]
    whole.value, count.value = 1, 2
    assert read(-1, *arguments, ctypes.byref(whole), ctypes.byref(count)) == errno.EIO
    assert (whole.value, count.value) == (1, 2)
