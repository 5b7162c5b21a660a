"""The command `wherefrom show`: one picture of a source, looked up by its key or its number.

Here: what is printed about it, writing it to a file.
Not here: the index that knows it (pipeline/shards/index.py), how `wherefrom index` sums one up (index.py).
Text from the source is printed with control characters escaped.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.picture_headers import FORMATS, MAX_ENCODED_BYTES
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.shards.store import printable
from wherefrom.tools.console import print_line, print_pairs, progress

__all__ = ["show_command"]

MOST_SHOWN = 10  # samples of one key
NUMBER = re.compile(r"\+?(0|[1-9][0-9]{0,17})")  # 000123 may be a key, and is no number
SUFFIXES = {"jpeg": (".jpg", ".jpeg"), "png": (".png",), "webp": (".webp",)}  # of a file with a picture's bytes as they are


def show_command(source: str, which: str, *, labels: str | None = None, out: Path | None = None) -> int:
    """Look a picture up: where its bytes lie, size, orientation, label, and whether it is valid; it is decoded to see.

    Args:
        source: where it is, as for `wherefrom index`.
        which: its key, or its number. A word that is both is taken for the key; +5 is number 5 whatever the keys are.
        labels: what labels samples, as for `wherefrom index`.
        out: write the picture there: its bytes as they are under its own suffix (.jpg), upright and decoded as .png.
    Returns: the exit code, 0.
    Raises: OSError or ValueError of one line if there is no such source or picture, or it cannot be written.
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.absolute().parent}; make it, or take another --out")
    console = Console()
    with progress(console, "indexing") as show:
        index = ShardIndex.open(source, labels=labels, progress=show)
    samples = _looked_up(index, which)
    if out is not None and len(samples) > 1:
        numbers = " or ".join(f"+{sample} ({printable(index.location(sample)[0])})" for sample in samples[:MOST_SHOWN])
        raise ValueError(f"{len(samples)} samples have the key {which!r:.100}; write one of them by its number, {numbers}")
    for sample in samples[:MOST_SHOWN]:
        encoded = _read(index, sample)
        picture, fault = _decoded(index, sample, encoded)
        if out is not None:
            _write(out, index, sample, encoded, picture)
        print_pairs(console, [*_facts(index, sample, encoded, fault)])
    if len(samples) > 1:
        print_line(console, f"{len(samples)} samples have the key {which!r:.100}")
    if NUMBER.fullmatch(which) and samples != [int(which)] and int(which) < len(index):
        print_line(console, f"{which} is a key here; +{int(which)} is sample number {int(which)}")
    if out is not None:
        print_line(console, f"written to {out}")
    return 0


def _looked_up(index: ShardIndex, which: str) -> list[int]:
    """Return the samples that a word names: those that have it as their key, else the one of that number.

    Raises: ValueError in one line if there is none.
    """
    numbered = NUMBER.fullmatch(which)
    samples = [] if which.startswith("+") and numbered else index.ids_of(which)
    if samples:
        return samples
    if numbered and int(numbered[1]) < len(index):
        return [int(numbered[1])]
    if numbered:
        raise ValueError(f"no sample has the key {which!r}, nor that number; they are numbered 0 to {len(index) - 1}")
    near = index.nearest_keys(which)
    mend = f"the nearest keys are {', '.join(map(printable, near))}" if near else f"keys are such as {printable(index.key(0))}"
    raise ValueError(f"no sample has the key {which!r:.100}; {mend}")


def _read(index: ShardIndex, sample: int) -> NDArray[np.uint8] | None:
    """Return a sample's bytes as they lie there; None if they are more than any picture has."""
    if index.length[sample] > MAX_ENCODED_BYTES:
        return None
    with ShardReader(index, max_open=1) as reader:
        return reader.read(sample)


def _decoded(index: ShardIndex, sample: int, encoded: NDArray[np.uint8] | None) -> tuple[NDArray[np.uint8] | None, str]:
    """Return the upright picture (H, W, 3) and "", or None and why there is none: it is decoded as strictly as in training.

    What a damaged header says is not believed, nor room made for it.
    """
    size = index.source_size[sample].astype(np.int64)
    if encoded is None or not size.prod() or size.prod() > index.max_pixels:
        return None, f"not tried: {index.reason(sample)}"
    try:
        picture = decode_picture(encoded, int(index.orientation[sample]))
    except DECODE_ERRORS as problem:
        return None, printable(str(problem))
    if picture.shape[:2] != tuple(size.tolist()):
        return None, f"gives (height, width) {picture.shape[:2]}, its header says {tuple(size.tolist())}"
    return picture, ""


def _facts(index: ShardIndex, sample: int, encoded: NDArray[np.uint8] | None, fault: str) -> Iterator[tuple[str, str]]:
    file, offset, length = index.location(sample)
    orientation, (height, width) = int(index.orientation[sample]), index.source_size[sample].tolist()
    yield "key", printable(index.key(sample))
    yield "number", f"{sample} of {len(index)}"
    yield "file", printable(file)
    yield "bytes", f"{length} from byte {offset} on"
    if encoded is not None:
        yield "sha256", hashlib.sha256(encoded.data).hexdigest()
    yield "format", FORMATS[index.format[sample]]
    if height:
        stored = (width, height) if orientation < 5 else (height, width)
        yield "stored", f"{stored[0]} x {stored[1]} px (width x height), EXIF orientation {orientation}"
        yield "upright", f"{width} x {height} px"
    label = int(index.label[sample])
    yield "label", "none" if label < 0 else f"{label}, {printable(index.classes[label])}" if index.classes else f"{label}"
    reason = index.reason(sample)
    yield "valid", f"no: {reason}" if reason else "yes"
    yield "decodes", f"no: {fault}" if fault else "yes, strictly"
    if reason or fault:
        index.mark_invalid(sample, fault)  # of this index in memory alone
        shows = index.invalid_count < len(index)
        yield "shown", f"sample {int(index.replacement([sample])[0])} in its place" if shows else "nothing: no sample is valid"


def _write(out: Path, index: ShardIndex, sample: int, encoded: NDArray[np.uint8] | None, picture: NDArray[np.uint8] | None) -> None:
    """Write a picture's bytes under its own suffix, its pixels as .png, whole or not at all.

    Raises: ValueError in one line for another suffix, or a picture that has no pixels.
    """
    kind, suffix = FORMATS[index.format[sample]], out.suffix.lower()
    own = SUFFIXES.get(kind)  # None: a format that is none of ours, under any suffix
    as_it_is = suffix in own if own else suffix != ".png"
    instead = f"take {own[0] if own else 'another suffix'} for its bytes as they are"
    if not as_it_is and suffix != ".png":
        raise ValueError(f"{out}: sample {sample} is a {kind}; {instead}, .png for its pixels upright")
    if as_it_is and encoded is None:
        raise ValueError(f"{out}: sample {sample} {index.reason(sample)}; it is not read")
    if not as_it_is and picture is None:
        raise ValueError(f"{out}: sample {sample} does not decode and has no pixels; {instead}")
    with write_aside(out) as aside:
        if as_it_is and encoded is not None:
            aside.write_bytes(encoded.data)
        elif picture is not None:
            Image.fromarray(np.ascontiguousarray(picture)).save(aside, "PNG")
