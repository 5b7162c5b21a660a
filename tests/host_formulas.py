"""Inputs of the figures in tests/data/hosts, which the authors' code gave, and how one compares with them. float64.

wave:      pseudo-random numbers by formula; integer phases are exact, so any platform gives them to 1 ulp of sin.
parameter: the weight given to a parameter named as its authors name it.
pair:      two correlated feature matrices.
picture:   batches of view v at update t; views of a sample share 70 % of their signal.
noise:     in (0, 1), for masks.
summary:   what is stored of an array (`at`: flat C-order index -> value; `probe`: dot with wave(shape, 999)).
gap:       how far an array is from what is stored of another, of the largest value or of the norm.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Shape = int | Sequence[int]


def figures(method: str) -> dict[str, Any]:
    """Return what is stored of a method: figures, the repository, the commit."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "hosts" / f"{method}.json").read_text(encoding="utf-8"))
    return found


def tensor(array: ArrayLike) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def wave(shape: Shape, seed: int, scale: float = 1.0) -> NDArray[np.float64]:
    n = int(np.prod(shape))
    i = np.arange(n, dtype=np.int64)
    phase = (3 * i**3 + 7 * i**2 + (13 + 37 * seed) * i + 101 * seed) % 1000003
    return scale * np.sin(phase.astype(np.float64)).reshape(shape)


def name_seed(name: str) -> int:
    return zlib.crc32(name.encode()) % 997


def parameter(name: str, shape: Sequence[int]) -> NDArray[np.float64]:
    w = wave(shape, name_seed(name))
    if name.endswith("weight_g"):
        return np.ones(shape)
    if "token" in name or "pos_embed" in name:
        return 0.2 * w
    if name.endswith("bias"):
        return 0.1 * w
    if len(shape) == 1:  # norm weights
        return 1 + 0.1 * w
    return w * np.sqrt(2.0 / np.prod(shape[1:]))  # torch layout: (out, in, ...)


def pair(shape: Shape, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    common = wave(shape, seed)
    return 0.7 * common + 0.5 * wave(shape, seed + 1), 0.7 * common + 0.5 * wave(shape, seed + 2)


def picture(shape: Shape, view: int, update: int) -> NDArray[np.float64]:
    return 0.7 * wave(shape, 300 + 10 * update) + 0.5 * wave(shape, 301 + 10 * update + view)


def noise(shape: Shape, seed: int) -> NDArray[np.float64]:
    return 0.5 + 0.4999 * wave(shape, seed)


def summary(array: ArrayLike, full: int = 16) -> Any:
    a = np.asarray(array, dtype=np.float64)
    if a.ndim == 0:
        return float(a)
    if a.size <= full:
        return a.tolist()
    flat = a.reshape(-1)
    index = sorted({round(k * (a.size - 1) / 4) for k in range(5)})
    return {
        "shape": list(a.shape),
        "l2": float(np.sqrt((flat**2).sum())),
        "sum": float(flat.sum()),
        "probe": float((flat * wave(a.size, 999)).sum()),
        "at": {str(k): float(flat[k]) for k in index},
    }


def gap(ours: Tensor | ArrayLike, theirs: Any) -> float:
    own = summary(ours.detach().numpy() if isinstance(ours, Tensor) else ours)
    if isinstance(theirs, dict):
        scale = max(theirs["l2"], 1e-12)
        pairs = [(own[key], theirs[key]) for key in ("l2", "probe")] + [(own["at"][at], theirs["at"][at]) for at in theirs["at"]]
    else:
        flat, stored = np.ravel(own), np.ravel(theirs)
        scale, pairs = max(float(np.abs(stored).max()), 1e-12), list(zip(flat, stored, strict=True))
    return max(abs(x - y) for x, y in pairs) / scale
