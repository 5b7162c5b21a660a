"""Features of pictures as files for whatever comes next, written piece by piece, so that a stopped command goes on.

Here: what is computed of whole pictures, the files, in safetensors or parquet.
Not here: protocols (protocols.py), where networks and pictures come from (network.py, pictures.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.train.evaluation.features import BLOCK, WHOLE, Part, last_layers
from wherefrom.train.evaluation.network import Network
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, blocks
from wherefrom.train.plain_data import Plain
from wherefrom.train.ranks import Ranks

if TYPE_CHECKING:
    import pyarrow

Form = Literal["safetensors", "parquet"]
ABOUT = "features.json"
TOKENS = "tokens"  # the name of a token map, beside parts of whole pictures
PIECE = 64 * BLOCK  # pictures of one file
PIECE_OF_TOKENS = 4 * BLOCK  # where it holds token maps: of a ViT-L at 518 px, 1.4 GB


def embed(
    network: Network,
    pictures: PictureSource,
    folder: Path,
    *,
    parts: Mapping[str, Part],
    tokens: bool = False,
    form: Form = "safetensors",
    picture_px: int | None = None,
    key_of: Callable[[int], str] = str,
    about: Mapping[str, Plain] | None = None,
    ranks: Ranks | None = None,
    progress: ReportProgress | None = None,
) -> int:
    """Write the features of all pictures into a folder; return how many files it holds now.

    Each file has 4096 pictures, with `tokens` 256, in their order: `sample` their numbers, `shown` those of the pictures that were shown in
    their place where they are damaged, `label` (-1: none), `key`, and by name the parts (D,) and, with `tokens`, the token map
    (h, w, D), float32. In safetensors the keys are in the file's metadata, as JSON. Files that are there are left alone; ranks share the
    others.
    Raises: ValueError in one line if the folder holds other features, the network lacks a part or takes no such pictures, or pyarrow is
    missing.
    """
    ranks = ranks or Ranks(0, 1)
    px = network.px(picture_px)
    piece = min(PIECE, PIECE_OF_TOKENS) if tokens else PIECE
    same = (
        dict(about or {})
        | {
            "network": network.identity,
            "picture_px": px,
            "pictures": len(pictures),
            "parts": {name: part.name for name, part in parts.items()} | ({TOKENS: "the token map"} if tokens else {}),
            "form": form,
        }
        | ({"pictures_a_file": piece} if tokens else {})
    )
    write = _write_parquet if form == "parquet" else _write_safetensors
    if form == "parquet":
        _pyarrow()
    for name, part in parts.items():
        if part.token == "class" and not network.encoder.has_class_token:
            raise ValueError(f"{network.name}: has no class token; leave {name} out")
    with torch.no_grad():  # refuses pictures of a size that the network does not take, before there is a folder
        network.encoder.encode(torch.zeros(1, 1, 3, px, px, device=next(network.encoder.parameters()).device))
    ranks.first_does(lambda: _claim(folder, same))
    ids = np.arange(len(pictures))
    files = -(-len(ids) // piece)
    names = [folder / f"features-{number:06d}-of-{files:06d}.{form}" for number in range(files)]
    missing = [number for number, name in enumerate(names) if not name.exists()]
    for number in missing[ranks.rank :: ranks.count]:
        some = ids[number * piece : (number + 1) * piece]
        columns = _columns(network, pictures, some, parts, tokens=tokens, px=px, progress=progress)
        with write_aside(names[number]) as aside:
            write(aside, columns, [key_of(sample) for sample in some.tolist()])
    ranks.wait()
    return len(names)


def _claim(folder: Path, same: Mapping[str, Plain]) -> None:
    """Write down what a folder's features are of, or see that they are of the same.

    Raises: ValueError in one line if they are not.
    """
    file = folder / ABOUT
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        if any(folder.iterdir()):
            raise ValueError(f"{folder}: is not empty; take another --out")
        with write_aside(file) as aside:
            aside.write_text(json.dumps(same, indent=1) + "\n", encoding="utf-8")
        return
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        known = {}
    for name, value in same.items():
        if known.get(name) != value:
            raise ValueError(f"{folder}: holds features with {name} {known.get(name)!r:.80}, not {value!r:.80}; take another --out")


def _columns(
    network: Network,
    pictures: PictureSource,
    ids: np.ndarray,
    parts: Mapping[str, Part],
    *,
    tokens: bool,
    px: int,
    progress: ReportProgress | None,
) -> dict[str, Tensor]:
    """Return the features of some pictures, and what stands beside them, a row each."""
    recipe = ViewRecipe(families=(ViewFamily(name="whole", views=1, size_px=(px, px), law=WHOLE),), mean=network.mean, std=network.std)
    deepest = max((part.layers for part in parts.values()), default=1)
    device = next(network.encoder.parameters()).device
    columns: dict[str, list[Tensor]] = {}
    for number, block in enumerate(blocks(ids, BLOCK)):
        batch = pictures.views(recipe, block).to(device)
        with torch.no_grad():
            layers = last_layers(network.encoder, batch.family("whole"), deepest)
        found = {"sample": batch.drawn_for, "shown": batch.sample, "label": batch.label}
        found |= {name: part.of(layers) for name, part in parts.items()}
        if tokens:
            found[TOKENS] = layers[-1].tokens[:, 0].float()
        for name, values in found.items():
            columns.setdefault(name, []).append(values.cpu())
        if progress is not None:
            progress("features", int(ids[0]) + min(len(ids), (number + 1) * BLOCK), len(pictures))
    return {name: torch.cat(values) for name, values in columns.items()}


def _write_safetensors(path: Path, columns: Mapping[str, Tensor], keys: Sequence[str]) -> None:
    save_file({name: values.contiguous() for name, values in columns.items()}, path, metadata={"keys": json.dumps(list(keys))})
    path.chmod(0o644)


def _write_parquet(path: Path, columns: Mapping[str, Tensor], keys: Sequence[str]) -> None:
    arrow = _pyarrow()
    table = {"key": arrow.array(list(keys))}
    shapes = {}
    for name, values in columns.items():
        flat = arrow.array(values.flatten().numpy())
        table[name] = flat if values.ndim == 1 else arrow.FixedSizeListArray.from_arrays(flat, values[0].numel())
        shapes[name] = json.dumps(list(values.shape[1:]))
    arrow.parquet.write_table(arrow.table(table).replace_schema_metadata(shapes), path)


def _pyarrow() -> "pyarrow":
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("form parquet: pyarrow is missing; pip install 'wherefrom[parquet]', or take safetensors") from None
    return pyarrow
