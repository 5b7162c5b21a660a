"""The embedded default data: a small labeled picture set, rendered once into the user's cache as ordinary WebDataset shards.

Here: which pictures there are, how they become tar files, how a half-written set is never seen, and masks of any of them by its key.
Not here: what a picture shows (scenes.py); reading the shards (pipeline/shards), which knows nothing of their origin.
"""

import io
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from wherefrom.pipeline.demo.scenes import SceneMasks, render_scene, trace_scene
from wherefrom.pipeline.demo.things import KINDS
from wherefrom.pipeline.system import available_cores, user_cache_folder

__all__ = ["DemoShards", "demo_masks", "demo_shards"]

GENERATOR = 2  # part of the folder's name: raise it with every change of a byte
SEED = 0
SPLITS = {"train": 0, "val": 1}  # the numbers enter the seeds
PICTURES_PER_SHARD = 750
SHORT_SIDE_PX = (144, 192)
ASPECT = (3 / 4, 4 / 3)  # width / height
JPEG_QUALITY = 90
LENGTH = struct.Struct("<I")  # precedes each picture that a worker sends
WORKER = (  # interrupts are the parent's to handle
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    "from wherefrom.pipeline.demo.shards import _write_stripe; _write_stripe(*map(int, sys.argv[2:]))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoShards:
    """Patterns of the shards, training and held-out, as the loader takes them."""

    train: str
    val: str


def demo_shards(
    cache: Path | None = None,
    *,
    train: int = 3000,
    val: int = 500,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> DemoShards:
    """Return the demo's shards, rendering them first where the cache does not hold them yet.

    Ten kinds in turn, so labels 0 to 9 are balanced; train and val are numbers of pictures and come from different seeds of one generator.
    The set is written aside and renamed when complete: of two processes that start at once one wins and both return the same shards.
    `progress(done, total)` is called as pictures are finished; without it one line on standard error says that they are being drawn,
    which takes a while. `workers` are processes, by default one a core; 1 renders in this one.
    Raises: ValueError if a number is below 1; OSError if the cache cannot be written.
    """
    for name, number in (("train", train), ("val", val), ("workers", 1 if workers is None else workers)):
        if number < 1:
            raise ValueError(f"{name}={number}: needs at least 1")
    parent = user_cache_folder() if cache is None else cache.absolute()
    folder = parent / f"demo-v{GENERATOR}-{train}-{val}"
    if not folder.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        if progress is None:
            print(f"drawing {train + val} demo pictures, once; they are kept in {folder}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".demo-", ignore_cleanup_errors=True) as aside:
            complete = Path(aside) / folder.name
            _write_set(complete, {"train": train, "val": val}, progress, workers or available_cores())
            _rename_unless_there(complete, folder)
    return DemoShards(train=_pattern(folder, "train", train), val=_pattern(folder, "val", val))


def _write_set(folder: Path, counts: dict[str, int], progress: Callable[[int, int], None] | None, workers: int) -> None:
    folder.mkdir()
    total = sum(counts.values())
    splits = {}
    with _rendering(counts, min(workers, total)) as jpegs:
        pictures = _counting(jpegs, total, progress)
        for split, count in counts.items():
            names = _shard_names(split, count)
            lengths = []
            for name, first in zip(names, range(0, count, PICTURES_PER_SHARD), strict=True):
                lengths.append(min(PICTURES_PER_SHARD, count - first))
                _write_shard(folder / name, split, first, islice(pictures, lengths[-1]))
            splits[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": count}
    (folder / "_info.json").write_text(json.dumps({"splits": splits, "classes": list(KINDS)}, indent=1) + "\n", encoding="utf-8")


def _write_shard(path: Path, split: str, first: int, pictures: Iterator[bytes]) -> None:
    """Write pictures first, first + 1, ... of a split into one tar."""
    from webdataset import TarWriter  # here: whoever finds the shards rendered does without it

    with path.open("wb") as file, TarWriter(file, mtime=0.0) as tar:
        for number, jpeg in enumerate(pictures, start=first):
            tar.write({"__key__": f"{split}-{number:06d}", "jpg": jpeg, "cls": str(number % len(KINDS)).encode()})


def demo_masks(key: str) -> SceneMasks:
    """Return what the pixels of a demo picture show, by the key that it has in its shard, such as train-000042: drawn anew, some 10 ms.

    Raises: ValueError if that is no key of the demo's.
    """
    split, _, number = key.partition("-")
    if split not in SPLITS or not number.isdecimal():
        raise ValueError(f"{key!r} is no picture of the demo's; its keys are train-000000, val-000000 and so on")
    return trace_scene(*_scene(split, int(number)))


def _scene(split: str, number: int) -> tuple[str, np.random.Generator, tuple[int, int]]:
    """Return what a picture is drawn from: its kind, its generator, (height, width)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((SEED, SPLITS[split], number))))
    return list(KINDS)[number % len(KINDS)], rng, _draw_size(rng)


def _jpeg(picture: tuple[str, int]) -> bytes:
    image = render_scene(*_scene(*picture))
    encoded = io.BytesIO()
    image.save(encoded, format="JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw (height, width) in pixels: the short side uniform, the aspect log-uniform."""
    short = int(rng.integers(*SHORT_SIDE_PX, endpoint=True))
    aspect = math.exp(rng.uniform(*np.log(ASPECT)))
    return (short, round(short * aspect)) if aspect > 1 else (round(short / aspect), short)


@contextmanager
def _rendering(counts: dict[str, int], workers: int) -> Iterator[Iterator[bytes]]:
    """Give the pictures' bytes in order; worker w of n renders every n-th of them, a single worker is this process."""
    if workers == 1:
        yield map(_jpeg, _pictures(counts))
        return
    # plain processes that share nothing: multiprocessing would fork threads and a GPU, or run the caller's script once more
    command = [sys.executable, "-c", WORKER, json.dumps(sys.path), *map(str, counts.values()), str(workers)]
    processes = [subprocess.Popen([*command, str(worker)], stdout=subprocess.PIPE) for worker in range(workers)]
    try:
        yield (_receive(process) for process, _ in zip(cycle(processes), _pictures(counts), strict=False))
    finally:
        for process in processes:
            process.terminate()
            process.communicate()


def _write_stripe(train: int, val: int, workers: int, worker: int) -> None:
    """Write one worker's pictures to standard output, each as its length in four bytes and its bytes; end when nobody listens."""
    for picture in islice(_pictures({"train": train, "val": val}), worker, None, workers):
        jpeg = _jpeg(picture)
        try:
            sys.stdout.buffer.write(LENGTH.pack(len(jpeg)) + jpeg)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os._exit(1)


def _receive(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    head = process.stdout.read(LENGTH.size)
    jpeg = process.stdout.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""
    if not jpeg:
        raise RuntimeError(f"a rendering process ended early, with exit code {process.wait()}; use workers=1 to render in this one")
    return jpeg


def _pictures(counts: dict[str, int]) -> Iterator[tuple[str, int]]:
    return ((split, number) for split, count in counts.items() for number in range(count))


def _counting(pictures: Iterator[bytes], total: int, progress: Callable[[int, int], None] | None) -> Iterator[bytes]:
    for done, picture in enumerate(pictures, start=1):
        if progress is not None:
            progress(done, total)
        yield picture


def _rename_unless_there(complete: Path, folder: Path) -> None:
    try:
        os.rename(complete, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first; its pictures are the same
            raise


def _shard_names(split: str, count: int) -> list[str]:
    return [f"{split}-{shard:06d}.tar" for shard in range(math.ceil(count / PICTURES_PER_SHARD))]


def _pattern(folder: Path, split: str, count: int) -> str:
    names = _shard_names(split, count)
    if len(names) == 1:
        return str(folder / names[0])
    return str(folder / f"{split}-{{000000..{len(names) - 1:06d}}}.tar")
