"""The command `wherefrom index`: builds, audits and explains the index of a set of shards.

Here: what is printed about an index.
Not here: the index itself (pipeline/shards/index.py), parsing the command line (cli.py).
Text from the shards is printed with control characters escaped and never read as markup.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wherefrom.pipeline.shards.index import MAX_PIXELS, ShardIndex
from wherefrom.pipeline.shards.picture_headers import FORMATS
from wherefrom.pipeline.shards.store import file_beside, printable
from wherefrom.tools.console import in_bytes, print_line, print_pairs, progress
from wherefrom.tools.mixing import mixing

__all__ = ["index_command"]


def index_command(
    pattern: str,
    *,
    rebuild: bool = False,
    decode: bool = False,
    workers: int | None = None,
    cache: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    labels: str | None = None,
    batch: int = 256,
    list_quarantine: int = 20,
    quarantine: Path | None = None,
) -> int:
    """Build, audit and explain the index of the shards that PATTERN names.

    Args:
        pattern: a shard, a folder of shards or of pictures, a glob, or 'train-{000000..001281}.tar'; '::' joins several.
        rebuild: read the shards again even where a stored index fits.
        decode: really decode every picture once; those that fail are quarantined from then on.
        workers: threads; default: one a processor.
        cache: where the index is kept when nothing can be written beside the shards; default: the user's cache folder.
        max_pixels: larger pictures are quarantined.
        labels: what labels samples: a member such as 'cls' or 'txt', 'json.FIELD', 'tar' (each tar's name) or 'none'; default: whole
            numbers in KEY.cls, folders' names, names of tars within a tar.
        batch: how many pictures make the batches by which it says how well the order of training mixes shards and classes.
        list_quarantine: how many quarantined samples are listed.
        quarantine: a file for all of them, one JSON object a line.
    Returns: the exit code, 0.
    Raises: OSError or ValueError of one line for shards that cannot be indexed.
    """
    if quarantine is not None and not quarantine.absolute().parent.is_dir():
        raise ValueError(f"{quarantine}: there is no folder {quarantine.absolute().parent}; make it, or take another --quarantine")
    if batch < 2:
        raise ValueError(f"batch={batch}: needs at least 2 pictures to compare")
    console = Console()
    start = time.perf_counter()
    with progress(console, "indexing") as show:
        index = ShardIndex.open(
            pattern, rebuild=rebuild, decode=decode, workers=workers, cache=cache, max_pixels=max_pixels, labels=labels, progress=show
        )
    print_pairs(
        console,
        [*_facts(index), *mixing(index, batch), ("index", _where(index, time.perf_counter() - start)), ("fingerprint", index.fingerprint)],
    )
    _print_quarantine(console, index, list_quarantine)
    if quarantine is not None:
        index.write_quarantine(quarantine)
        print_line(console, f"{index.invalid_count} quarantined samples written to {quarantine}")
    return 0


def _facts(index: ShardIndex) -> Iterator[tuple[str, str]]:
    count, invalid = len(index), index.invalid_count
    sizes = index.source_size[(index.source_size > 0).all(1)]
    trees = sum(map(index.is_tree, range(len(index.paths))))
    shards = f"{len(index.paths)} ({trees} of loose files)" if trees else f"{len(index.paths)}"
    yield "shards", f"{shards}, {in_bytes(int(index.shard_stamps[:, 1].sum()))}; samples a shard: {_quantiles(index.shard_lengths)}"
    yield "samples", f"{count}: {count - invalid} valid, {invalid} quarantined; {in_bytes(int(index.length.sum()))} of pictures"
    if len(sizes):
        yield "height", _quantiles(sizes[:, 0], "px")
        yield "width", _quantiles(sizes[:, 1], "px")
        yield "pixels", _quantiles(sizes.prod(1, dtype=np.int64) / 1e6, "MP")
    yield "format", _counts(index.format, lambda code: FORMATS[code])
    yield "orientation", _counts(index.orientation, lambda value: f"EXIF {value}")
    labels, members = np.unique(index.label[index.label >= 0], return_counts=True)
    if len(labels):
        unlabeled = count - int(members.sum())
        without = f"; {unlabeled} samples without" if unlabeled else ""
        yield "classes", f"{len(labels)}, numbered {labels[0]} to {labels[-1]}; samples a class: {_quantiles(members)}{without}"
        if index.classes:
            yield "", _class_names(index)
    else:
        yield "classes", "none"
    if index.unread_members:
        where = "members of tars" if not trees else "files" if trees == len(index.paths) else "members of tars and files"
        yield "not read", ", ".join(f"{number} {kind}" for kind, number in index.unread_members.most_common(8)) + f" ({where})"


def _class_names(index: ShardIndex) -> str:
    """Say which number the first and the last class have, and where all of them are written."""
    shown = [*range(len(index.classes))] if len(index.classes) <= 4 else [0, 1, len(index.classes) - 1]
    words = [f"{number} {printable(index.classes[number])}" for number in shown]
    if len(words) < len(index.classes):
        words.insert(2, "...")
    return ", ".join(words) + (f"; all in {index.classes_file}" if index.classes_file is not None else "")


def _where(index: ShardIndex, seconds: float) -> str:
    locations: Counter[str] = Counter()
    for path, file in zip(index.paths, index.files, strict=True):
        beside = file == file_beside(path, index.labels)
        locations["not stored" if file is None else "in .wherefrom beside the shards" if beside else f"in {file.parent}"] += 1
    where = ", ".join(f"{count} {location}" if len(locations) > 1 else location for location, count in locations.items())
    return f"{index.reused} reused, {len(index.paths) - index.reused} built, {seconds:.2f} s; {where}"


def _print_quarantine(console: Console, index: ShardIndex, limit: int) -> None:
    """List the first quarantined samples with their reasons."""
    entries = index.quarantine(max(limit, 0))
    if entries and console.is_terminal:
        table = Table("id", "shard", "key", "reason", title="quarantined: replaced by the next valid sample", title_justify="left")
        for entry in entries:
            table.add_row(str(entry.id), Text(Path(entry.shard).name), Text(printable(entry.key)), Text(entry.reason))
        console.print(table)
    else:
        for entry in entries:
            print_line(console, f"quarantined  {entry.id} {Path(entry.shard).name}:{printable(entry.key)} {entry.reason}")
    if index.invalid_count > len(entries):
        print_line(console, f"... {index.invalid_count - len(entries)} more are quarantined; --quarantine FILE writes them all")


def _quantiles(values: NDArray, unit: str = "") -> str:
    low, middle, high = (f"{value:.3g}" if values.dtype.kind == "f" else f"{value:.0f}" for value in np.quantile(values, (0, 0.5, 1)))
    return f"{low} {unit}".rstrip() if low == high else f"{low} / {middle} / {high} {unit}".rstrip() + " (min / median / max)"


def _counts(codes: NDArray[np.uint8], name: Callable[[int], str]) -> str:
    values, counts = np.unique(codes, return_counts=True)
    by_count = sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)
    return ", ".join(f"{count} {name(value)}" for count, value in by_count)
