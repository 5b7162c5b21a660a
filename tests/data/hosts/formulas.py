"""Inputs and summaries of figures.json; ours, no code of any author. float64 NumPy only.

wave:      pseudo-random numbers by formula; integer phases are exact, so any platform gives them to 1 ulp of sin.
parameter: the weight given to a parameter named as its authors name it.
picture:   batches of view v at update t; views of a sample share 70 % of their signal.
summary:   what figures.json stores of an array (`at`: flat C-order index -> value; `probe`: dot with wave(shape, 999)).
"""

import zlib

import numpy as np


def wave(shape, seed, scale=1.0):
    n = int(np.prod(shape))
    i = np.arange(n, dtype=np.int64)
    phase = (3 * i**3 + 7 * i**2 + (13 + 37 * seed) * i + 101 * seed) % 1000003
    return scale * np.sin(phase.astype(np.float64)).reshape(shape)


def name_seed(name):
    return zlib.crc32(name.encode()) % 997


def parameter(name, shape):
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


def pair(shape, seed):
    """Two correlated feature matrices."""
    common = wave(shape, seed)
    return 0.7 * common + 0.5 * wave(shape, seed + 1), 0.7 * common + 0.5 * wave(shape, seed + 2)


def picture(shape, view, update):
    return 0.7 * wave(shape, 300 + 10 * update) + 0.5 * wave(shape, 301 + 10 * update + view)


def noise(shape, seed):
    """In (0, 1), for masks."""
    return 0.5 + 0.4999 * wave(shape, seed)


def summary(array, full=16):
    a = np.asarray(array, dtype=np.float64)
    if a.ndim == 0:
        return float(a)
    if a.size <= full:
        return a.tolist()
    index = sorted({round(k * (a.size - 1) / 4) for k in range(5)})
    flat = a.reshape(-1)
    return {
        "shape": list(a.shape),
        "l2": float(np.sqrt((flat**2).sum())),
        "sum": float(flat.sum()),
        "probe": float((flat * wave(a.size, 999)).sum()),
        "at": {str(k): float(flat[k]) for k in index},
    }
