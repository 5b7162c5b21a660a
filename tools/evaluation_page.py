"""A page about a network: its scores, what it takes for alike, what its tokens tell apart, for a browser.

Here: the page, one file that holds its pictures. Not here: what is measured (train/evaluation/), the terminal's tables (evaluate.py).
"""

import base64
import html
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.tools.curves import draw_curves
from wherefrom.train.evaluation.features import WHOLE, Evaluation, Part, Split
from wherefrom.train.evaluation.knn import neighbors
from wherefrom.train.evaluation.pictures import blocks
from wherefrom.train.evaluation.protocols import Measured
from wherefrom.train.run_folder import RunFolder, read_metrics

SHOWN, NEAREST, BANK = 8, 6, 2000  # held-out pictures, neighbors of each, training pictures among which they are looked for
THUMBNAIL_PX = 112

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } .about, figcaption { color: gray; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; } th, td { padding: .2rem .9rem .2rem 0; text-align: left; }
th { border-bottom: 1px solid gray; } td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: .35rem; margin: .35rem 0; } .row img:first-child { margin-right: .7rem; }
img { border-radius: 3px; max-width: 100%; } figure { margin: .5rem 0; }
"""


def write_page(
    path: Path, evaluation: Evaluation, found: Sequence[Measured], *, about: Sequence[str], run: RunFolder | None = None
) -> None:
    """Write the page of an evaluation, whole or not at all; `about` stands at its top."""
    title = html.escape(evaluation.network.name)
    parts = [f"<h1>{title}</h1>", *(f'<p class="about">{html.escape(line)}</p>' for line in about)]
    parts += ["<h2>Scores</h2>", *_tables(found)]
    if run is not None and run.metrics.is_file():
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder, "curves.png")
            draw_curves(read_metrics(run), picture)
            parts += ["<h2>Curves of the run</h2>", f'<img alt="losses and results by update" src="{_data(picture.read_bytes(), "png")}">']
    parts += [*_neighbors(evaluation), *_token_maps(evaluation)]
    text = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>\n' + "\n".join(parts) + "\n"
    with write_aside(path) as whole:
        whole.write_text(text, encoding="utf-8")


def _tables(found: Sequence[Measured]) -> Iterator[str]:
    for measured in found:
        heading, *rows = measured.table()
        if not rows:
            yield f'<p class="about">{html.escape(heading[0])}</p>'
            continue
        lines = [f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>" for tag, row in _tagged(heading, rows)]
        yield f"<table>{''.join(lines)}</table>"


def _tagged(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    yield "th", heading
    yield from (("td", row) for row in rows)


def _neighbors(evaluation: Evaluation) -> Iterator[str]:
    """Yield held-out pictures, each with the training pictures that the network takes for most alike."""
    if evaluation.train is None:
        return
    asked, bank = evaluation.ids("held_out", SHOWN), evaluation.ids("train", BANK)
    cosine, nearest = neighbors(_summaries(evaluation, "train", bank), _summaries(evaluation, "held_out", asked), k=NEAREST)
    yield "<h2>Most alike</h2>"
    yield (
        f'<p class="about">A held-out picture, and the {nearest.shape[1]} of {len(bank)} training pictures whose summaries have the '
        "largest cosine to its own; that is written below each.</p>"
    )
    shown = _thumbnails(evaluation, "held_out", asked)
    for row, picture in enumerate(shown):
        others = _thumbnails(evaluation, "train", bank[nearest[row].cpu().numpy()])
        figures = [f"<figure>{_image(picture)}<figcaption>held out</figcaption></figure>"]
        figures += [
            f"<figure>{_image(other)}<figcaption>{value:.2f}</figcaption></figure>"
            for other, value in zip(others, cosine[row].tolist(), strict=True)
        ]
        yield f'<div class="row">{"".join(figures)}</div>'


def _token_maps(evaluation: Evaluation) -> Iterator[str]:
    """Yield held-out pictures, each beside the three largest principal components of its tokens as red, green, blue."""
    ids = evaluation.ids("held_out", SHOWN)
    px = 2 * evaluation.picture_px if evaluation.network.encoder.only_hw is None else evaluation.picture_px
    batch = evaluation.source("held_out").views(evaluation.recipe(evaluation.family(size_px=px)), ids).to(evaluation.device)
    with torch.no_grad():
        tokens = evaluation.network.encoder.encode(batch.family("whole")).tokens[:, 0].float()  # (n, h, w, D)
    flat = tokens.flatten(0, 2) - tokens.flatten(0, 2).mean(0)
    _, _, axes = torch.linalg.svd(flat.cpu(), full_matrices=False)
    components = (flat.cpu() @ axes[:3].mT).unflatten(0, tokens.shape[:3])
    low, high = components.flatten(0, 2).quantile(torch.tensor([0.02, 0.98]), dim=0)
    colors = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).mul(255).byte().numpy()
    yield "<h2>What tokens tell apart</h2>"
    yield (
        f'<p class="about">Tokens of pictures of {px} px: their three largest principal components, over all of these pictures, as red, '
        "green and blue. Places of one color are alike to the network.</p>"
    )
    figures = []
    for picture, components_of in zip(_thumbnails(evaluation, "held_out", ids), colors, strict=True):
        enlarged = Image.fromarray(components_of).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.NEAREST)
        figures.append(f"<figure>{_image(picture)}{_image(np.asarray(enlarged), lossless=True)}</figure>")
    yield f'<div class="row">{"".join(figures)}</div>'


def _summaries(evaluation: Evaluation, side: Split, ids: NDArray[np.int64]) -> Tensor:
    recipe = evaluation.recipe(evaluation.family())
    with torch.no_grad():
        return torch.cat(
            [
                Part().of(evaluation.network.encoder.last_layers(batch.family("whole"), 1))
                for _, batch in evaluation.batches(side, recipe, ids)
            ]
        )


def _thumbnails(evaluation: Evaluation, side: Split, ids: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    recipe = ViewRecipe(families=(evaluation.family(size_px=THUMBNAIL_PX, law=WHOLE),), pixels="uint8")
    for some in blocks(ids):
        yield from evaluation.source(side).views(recipe, some).family("whole").pixels[:, 0].permute(0, 2, 3, 1).cpu().numpy()


def _image(pixels: NDArray[np.uint8], *, lossless: bool = False) -> str:
    encoded = io.BytesIO()
    kind = "png" if lossless else "jpeg"
    Image.fromarray(pixels).save(encoded, kind.upper())
    return f'<img alt="" width="{pixels.shape[1]}" src="{_data(encoded.getvalue(), kind)}">'


def _data(encoded: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
