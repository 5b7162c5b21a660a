"""How the learning rate goes over a run: pure functions of the update, so that resuming needs no state.

Here: warm-up, then a cosine or a constant.
Not here: who sets it in the optimizer (loop.py); momenta of teachers, which belong to their objectives.
"""

import math
from typing import Literal

Shape = Literal["cosine", "constant"]


def warmed_up(update: int, *, updates: int, peak: float, warmup: int = 0, final: float = 0.0, shape: Shape = "cosine") -> float:
    """Return the value for update `update` of `updates`, counted from 0.

    It rises linearly over `warmup` updates, the first of which already takes a step, reaches `peak` at update `warmup`,
    and goes from there to `final` at the last update (cosine), or stays (constant).
    Raises: ValueError if the update is not one of the run, or the warm-up does not end within it.
    Source: SGDR, arXiv:1608.03983, without restarts.
    """
    if not 0 <= update < updates:
        raise ValueError(f"update={update}: needs 0 <= update < updates={updates}")
    if not 0 <= warmup < updates:
        raise ValueError(f"warmup={warmup}: needs 0 <= warmup < updates={updates}")
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if shape == "constant":
        return peak
    done = (update - warmup) / max(1, updates - 1 - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))
