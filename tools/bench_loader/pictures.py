"""The pictures of the loader's benchmark: as they are given, or enlarged to a number of megapixels in a shard of their own.

Here: enlarging, and what a set of pictures is like, in numbers. Not here: who is measured on them (command.py).
An enlarged picture is smooth: its file is small for its size and decodes faster than a photograph of as many pixels.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader

ENLARGED_PICTURES = 200  # at most: more add nothing to a rate
JPEG = {"quality": 90, "subsampling": "4:2:0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFacts:
    """What the pictures of an index are like."""

    number: int
    megapixels: float  # on average
    kilobytes: float  # of a file, on average
    origin: str  # how they came about


def picture_facts(index: ShardIndex, megapixels: float) -> PictureFacts:
    """Return what an index holds; megapixels: what it was enlarged to, 0 where it is as given."""
    encoding = f"JPEG quality {JPEG['quality']}, {JPEG['subsampling']}"
    origin = f"enlarged (bicubic) to {megapixels:g} MP, {encoding}: faster to decode than photographs" if megapixels else "as given"
    return PictureFacts(
        number=len(index),
        megapixels=round(float(index.source_size.prod(-1, dtype=np.int64).mean()) / 1e6, 3),
        kilobytes=round(float(index.length.mean()) / 1e3, 1),
        origin=origin,
    )


def enlarged_shard(index: ShardIndex, megapixels: float, folder: Path) -> Path:
    """Write some of an index's valid pictures, upright and enlarged to so many megapixels, into a shard and return its path.

    A picture that has as many pixels already keeps its size and is only encoded anew.
    """
    from webdataset import TarWriter

    valid = np.flatnonzero(index.valid)
    chosen = valid[np.unique(np.linspace(0, len(valid) - 1, ENLARGED_PICTURES).astype(int))]
    path = folder / f"enlarged-{megapixels:g}.tar"
    with ShardReader(index) as reader, path.open("wb") as file, TarWriter(file, mtime=0.0) as tar:
        for sample in chosen.tolist():
            picture = Image.fromarray(decode_picture(reader.read(sample), int(index.orientation[sample])))
            factor = max(1.0, (megapixels * 1e6 / (picture.width * picture.height)) ** 0.5)
            size = (round(picture.width * factor), round(picture.height * factor))
            encoded = io.BytesIO()
            picture.resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG", **JPEG)
            tar.write({"__key__": f"{sample:07d}", "jpg": encoded.getvalue()})
    return path
