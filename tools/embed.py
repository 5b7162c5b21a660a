"""The command `wherefrom embed`: features of pictures as files.

Here: what is opened for it. Not here: what is computed and written (train/evaluation/embedding.py).
"""

import contextlib
from pathlib import Path
from typing import Literal

from rich.console import Console

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools.console import ProgressLines, print_line, progress
from wherefrom.tools.evaluate import machine
from wherefrom.train.evaluation.embedding import Form, embed
from wherefrom.train.evaluation.features import Part
from wherefrom.train.evaluation.network import Which, open_network
from wherefrom.train.evaluation.pictures import ShardPictures

__all__ = ["embed_command"]


def embed_command(
    network: str,
    source: str,
    out: Path,
    *,
    parts: tuple[Literal["summary", "class", "mean", "tokens"], ...] = ("summary",),
    form: Form = "safetensors",
    which: Which = "exported",
    labels: str | None = None,
    picture_px: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    renderer: str = "auto",
    threads: int | None = None,
) -> int:
    """Write the features of whole pictures into a folder, piece by piece; called again, it goes on. Return 0.

    Args:
        network: a run's folder, a folder that timm loads, hf-hub:OWNER/NAME, or a model of timm.
        source: the pictures, as for `wherefrom index`.
        out: the folder, new, or with features of the same network and pictures.
        parts: what of a picture: what the network says itself, its class token, the mean of its tokens, all tokens.
        form: of the files; parquet needs pyarrow.
        which: of a run, the network that it exports, a teacher where its host has one, or the student.
        labels: what labels tar shards, as for `wherefrom index`.
        picture_px: side of whole pictures; default: as the network says.
        device: where the network computes.
        renderer: which cuts pictures, as for `wherefrom train`.
        threads: that read and render; default: the loader's choice.
    Raises: OSError or ValueError of one line if something cannot be had or does not fit.
    """
    opened = open_network(network, which=which)
    with contextlib.ExitStack() as stack:
        place, ranks = stack.enter_context(machine(device))
        console = Console(quiet=not ranks.first)
        opened.encoder.to(place.device)
        with ranks.led_by(place.is_local_main_process), progress(console, "indexing") as show:
            index = ShardIndex.open(source, labels=labels, progress=show)
        options = {"renderer": renderer, "threads": threads, "device": place.device}
        pictures = stack.enter_context(ShardPictures(index, **options))
        files = embed(
            opened,
            pictures,
            out,
            parts={part: Part(token=part) for part in parts if part != "tokens"},
            tokens="tokens" in parts,
            form=form,
            picture_px=picture_px,
            key_of=index.key,
            about={"data": index.fingerprint},
            ranks=ranks,
            progress=ProgressLines(lambda line: print_line(console, line)),
        )
        print_line(console, f"{len(index)} pictures in {files} files of {out}")
    return 0
