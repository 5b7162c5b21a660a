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
from PIL import Image, ImageDraw
from torch import Tensor

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.laws import Center
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.tools.curves import draw_curves
from wherefrom.train.evaluation.features import WHOLE, Evaluation, Part, Split, last_layers
from wherefrom.train.evaluation.knn import neighbors
from wherefrom.train.evaluation.pictures import blocks
from wherefrom.train.evaluation.protocols import Box, Measured, PairExample
from wherefrom.train.run_folder import RunFolder, read_metrics

SHOWN, NEAREST, BANK = 8, 6, 2000  # held-out pictures, neighbors of each, training pictures among which they are looked for
THUMBNAIL_PX = 112
PAIR_PX = 176  # the longer side of a picture that boxes are drawn on
BOXES = {"reference": "#ffffff", "target": "#56b4e9", "told": "#e69f00"}  # colors that the color-blind tell apart, by PairExample's names

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } .about, figcaption { color: gray; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; } th, td { padding: .2rem .9rem .2rem 0; text-align: left; }
th { border-bottom: 1px solid gray; } td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: .35rem; margin: .35rem 0; } .row img:first-child { margin-right: .7rem; }
.key { display: inline-block; width: 1.6rem; height: .8rem; border: 3px solid; outline: 1px solid black; vertical-align: middle; }
.key.told { border-style: dashed; }
.pairs img:first-child { margin-right: 0; }
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
    parts += [*_pairs(evaluation, found), *_neighbors(evaluation), *_token_maps(evaluation)]
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
        yield from (f'<p class="about">{html.escape(f"{measured.protocol}: not measured, {note}")}</p>' for note in measured.notes)


def _tagged(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    yield "th", heading
    yield from (("td", row) for row in rows)


def _pairs(evaluation: Evaluation, found: Sequence[Measured]) -> Iterator[str]:
    """Yield the best and the worst pairs of views, drawn on their pictures, by law."""
    by_law: dict[tuple[str, str], list[PairExample]] = {}
    for example in (example for measured in found for example in measured.examples):
        by_law.setdefault((example.law, example.rank), []).append(example)
    if not by_law:
        return
    yield "<h2>Pairs told best and worst</h2>"
    keys = {"reference": "the view that is known", "target": "where the other view lies", "told": "where the head says that it lies"}
    legend = ", ".join(
        f'<span class="key {name}" style="border-color: {BOXES[name]}; background: gray"></span> {words}' for name, words in keys.items()
    )
    yield (
        f"<p>{legend}.</p>"
        '<p class="about">Held-out pictures; a fresh head on the frozen encoder sees both views, and not the picture. Below each: how far '
        "the middle of the told box is off, in sides of the known view, and how much the told and the true box overlap (intersection "
        "over union). What is told may lie outside of the picture. Shape is not told: the told box has the true one's.</p>"
    )
    for (law, rank), examples in by_law.items():
        yield f'<p>Law {html.escape(law)}, {rank}:</p><div class="row pairs">'
        for example in examples:
            off, overlap = _off(example), _overlap(example.told, example.target)
            picture = _image(_with_boxes(evaluation, example))
            yield f"<figure>{picture}<figcaption>{off:.2f} sides off, overlap {overlap:.2f}</figcaption></figure>"
        yield "</div>"


def _with_boxes(evaluation: Evaluation, example: PairExample) -> NDArray[np.uint8]:
    """Return a picture with its boxes, (H, W, 3), with a margin of gray where what is told lies outside."""
    recipe = ViewRecipe(families=(evaluation.family(size_px=PAIR_PX, law=Center()),), pixels="uint8")
    batch = evaluation.source("held_out").views(recipe, np.array([example.sample]))
    squashed = batch.family("whole").pixels[0, 0].permute(1, 2, 0).cpu().numpy()
    height, width = batch.source_size[0].tolist()
    scale = PAIR_PX / max(height, width)
    picture = Image.fromarray(squashed).resize((max(1, round(scale * width)), max(1, round(scale * height))))
    margin = PAIR_PX // 8
    canvas = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), "gray")
    canvas.paste(picture, (margin, margin))
    draw = ImageDraw.Draw(canvas)
    for name, color in BOXES.items():
        box = [margin + scale * number for number in getattr(example, name)]
        x0, x1 = (min(max(x, 2), canvas.width - 3) for x in box[::2])
        y0, y1 = (min(max(y, 2), canvas.height - 3) for y in box[1::2])
        _outline(draw, (x0, y0, x1, y1), color, dashed=name == "told")
    return np.asarray(canvas)


def _outline(draw: ImageDraw.ImageDraw, box: Box, color: str, *, dashed: bool) -> None:
    """Draw a box 2 pixels thick on a dark edge of a pixel, so that it is seen on any picture; what lies under dashes, between them."""
    x0, y0, x1, y1 = box
    if not dashed:
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=4)
        draw.rectangle(box, outline=color, width=2)
        return
    for start, end in (((x0, y0), (x1, y0)), ((x1, y0), (x1, y1)), ((x1, y1), (x0, y1)), ((x0, y1), (x0, y0))):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        for at in np.arange(0, length, 9):
            ends = [tuple(s + (e - s) * min(1.0, along / length) for s, e in zip(start, end, strict=True)) for along in (at, at + 5)]
            draw.line([*ends[0], *ends[1]], fill="black", width=4)
            draw.line([*ends[0], *ends[1]], fill=color, width=2)


def _off(example: PairExample) -> float:
    """Return the distance of the middles of what is told and what is so, in sides of the reference."""
    reference, target, told = (np.array(box) for box in (example.reference, example.target, example.told))
    moved = (told[:2] + told[2:] - target[:2] - target[2:]) / 2
    return float(np.linalg.norm(moved / (reference[2:] - reference[:2])))


def _overlap(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes."""
    first, second = np.array(one), np.array(other)
    shared = np.prod((np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])).clip(min=0))
    return float(shared / (np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - shared))


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
                Part().of(last_layers(evaluation.network.encoder, batch.family("whole"), 1))
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
